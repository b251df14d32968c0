// The table of one instruction-set path's functions. The including file defines QPILOTS_ISA (its namespace) and
// QPILOTS_ISA_VEC (its vector header). Everything in a -inl.h file lives in that namespace with internal linkage, so
// that no function compiled for newer instructions can be picked by the linker for another path.
#pragma once

#include "kernels.h"
#include "path/backward-inl.h"
#include "path/backward_dot-inl.h"
#include "path/caches-inl.h"
#include "path/chain-inl.h"
#include "path/fingerprint-inl.h"
#include "path/forward-inl.h"
#include "path/operands-inl.h"
#include "path/pack-inl.h"
#include "path/peak-inl.h"
#include "path/rows-inl.h"
#include "path/steer_velocity_rows-inl.h"
#include "qpilots/types.h"
#include "tuning.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

template <class F, Activation kAct>
static void fill_activation(FormatKernels& t) {
#define QPILOTS_FILL(placement, name)                                              \
  t.activate[static_cast<int>(kAct)][static_cast<int>(NormPlacement::placement)] = \
      activate_rows<F, kAct, NormPlacement::placement>;
  if constexpr (kAct < kFirstUnfused) {
    QPILOTS_NORM_PLACEMENTS(QPILOTS_FILL)
  }
#undef QPILOTS_FILL
}

template <class F, class Out>
static void fill_vjp(void (*(&row)[kCount<NormPlacement>])(const ActivateVjpArgs&)) {
#define QPILOTS_FILL(placement, name) \
  row[static_cast<int>(NormPlacement::placement)] = activate_vjp_rows<F, Out, NormPlacement::placement>;
  QPILOTS_NORM_PLACEMENTS(QPILOTS_FILL)
#undef QPILOTS_FILL
}

static int rows_together() {
  using tuning::EveryPath;
  return second_level_bytes() >= EveryPath::kLargeSecondLevel ? EveryPath::kRowsTogetherLarge
                                                              : EveryPath::kRowsTogether;
}

template <class F>
static FormatKernels format_kernels() {
  FormatKernels t{};
  t.a_bytes = F::kABytes;
  t.rows_together = rows_together();
  t.forward = forward<F>;
  t.backward = backward<F>;
#define QPILOTS_FILL(activation, name) fill_activation<F, Activation::activation>(t);
  QPILOTS_ACTIVATIONS(QPILOTS_FILL)
#undef QPILOTS_FILL
  fill_vjp<F, F>(t.activate_vjp);
  fill_vjp<F, F32>(t.activate_vjp_f32);
  t.chain = chain_rows<F>;
  t.chain_vjp = chain_vjp_rows<F>;
  t.to_operand = convert_rows<F>;
  t.head = head_rows<F>;
  t.pack_panel = pack_panel<F>;
  return t;
}

static KernelTable make_table(const char* name) {
  KernelTable t{};
  t.name = name;
  t.lanes = Vec::kLanes;
  t.panel_width = kPanelVectors * Vec::kLanes;
  t.formats[0] = format_kernels<F32>();
  t.formats[1] = format_kernels<Bf16>();
  t.pack_vector = pack_vector;
  t.fingerprint = fingerprint;
  t.combine = combine_rows;
  t.posterior_softmax = softmax_row;
  t.steer_velocity = steer_velocity_rows;
  t.peak = peak_flops;
  t.fma_peak = peak_flops;
  t.read = read_bytes;
  return t;
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
