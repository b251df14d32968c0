// What the instruction-set paths offer to the rest of the backend: plain structs and one table of functions each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qpilots/types.h"

namespace qpilots::cpu {

// How the operands of a matrix product are stored. kBf16 rounds weights and both operands to bfloat16; products are
// summed in float32. Paths without vdpbf16ps keep rounded operands in float32 and expand the weights on the fly.
enum class Format : int { kF32 = 0, kBf16 = 1 };

// One packed matrix [out, in]: a block of columns of a Linear. The same copy serves the product with the weights and
// with their transpose. Panels of `panel_width` outputs; inside a panel, k-major:
//   kF32   [in_padded][panel_width]         kBf16  [in_padded / 2][panel_width][2]  (pairs along k, for vdpbf16ps)
// The last panel is as narrow as a whole number of vectors allows. Padding is zero.
struct Block {
  Format format;
  int in, out;
  int in_padded;   // multiple of kPad
  int out_padded;  // multiple of kPad
  int panel_width;
  int panels;
  std::size_t panel_stride;  // bytes
  std::size_t offset;        // bytes, within a member's arena
  int column;                // first column in the source matrix
};

inline constexpr int kPad = 16;  // every width is padded to this, for all paths
inline int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

// z[r, n] = init[r][n] + add[n] + sum_k a[r, k] W[n, k] for the outputs of panels [panel_begin, panel_end).
struct ForwardArgs {
  const Block* block;
  const char* weights;  // the block's first panel
  int panel_begin, panel_end;
  const void* a;            // [rows, in] operand
  std::ptrdiff_t a_stride;  // bytes
  int rows;
  const float* const* init;  // one row each; unused where init_shared is given
  const float* add;          // or null
  float* z;                  // [rows, out_padded]
  std::ptrdiff_t z_stride;
  const float* init_shared = nullptr;  // the same start for every row
};

// dx[r, k] = sum_n dy[r, n] W[n, k] for k in [k_begin, k_end), multiples of kPad.
struct BackwardArgs {
  const Block* block;
  const char* weights;
  int k_begin, k_end;
  const void* dy;  // [rows, out_padded] operand (of the backward kind)
  std::ptrdiff_t dy_stride;
  int rows;
  float* dx;  // [rows, in_padded]
  std::ptrdiff_t dx_stride;
  char* scratch;  // on a cache line; this thread's share of two operands of rows_together rows
  std::size_t scratch_bytes;
};

// h = act(z), act(LN(z)) or LN(act(z)), written as the next product's operand; keeps what the derivative needs.
struct ActivateArgs {
  int rows, width;
  int begin, end;  // columns; the whole padded width where there is a LayerNorm
  float* z;        // [rows, width padded]; scratch afterwards
  std::ptrdiff_t z_stride;
  const float* gamma;  // padded with zeros
  const float* beta;
  float layer_norm_eps;
  void* h;
  std::ptrdiff_t h_stride;  // bytes
  void* slope;              // act'(.), or null where no derivative will be asked; stored as an operand is
  void* xhat;               // with LayerNorm; likewise
  float* rstd;
  std::ptrdiff_t save_stride;  // bytes
};

// dz = dL/dz from d = dL/dh.
struct ActivateVjpArgs {
  int rows, width;
  int begin, end;
  const float* d;
  std::ptrdiff_t d_stride;  // 0: the same d for every row
  const float* d_scale;     // per row, or null
  const float* gamma;
  const void* slope;
  const void* xhat;
  const float* rstd;
  std::ptrdiff_t save_stride;  // bytes
  void* dz;                    // operand of the backward kind, or float32
  std::ptrdiff_t dz_stride;
};

// One operation of a chain on the rows of a hidden layer.
struct ChainOp {
  RowOpKind kind;
  Activation activation;
  float numbers[2];         // as qpilots_fast/row_ops.py says
  std::size_t gamma, beta;  // of a norm: bytes, within a member's arena
  std::size_t saved, rstd;  // bytes per saved row, within saves
  int film;                 // where a time's scale and shift stand among its film numbers
  bool keeps_values;        // whether derivatives need [padded width] numbers of it
  bool is_added;            // keep: an add follows; add: another add of the same row follows
};

// Forward: z through the chain, written as the next product's operand h. Backward: dz, written as h, from dL/dh, which
// is in z, or d for every row.
struct ChainArgs {
  const ChainOp* ops;
  int count;
  int rows, width;
  float* z;  // [rows, width padded]; scratch afterwards
  std::ptrdiff_t z_stride;
  const char* arena;  // the member's
  float* kept;        // [rows, width padded], forward the kept rows, backward their cotangents; or null
  std::ptrdiff_t kept_stride;
  const float* film;  // of row r at film + r film_stride, or null
  std::ptrdiff_t film_stride;
  char* saves;  // null: no derivative will be asked
  int saved_rows, first_saved;
  void* h;
  std::ptrdiff_t h_stride;  // bytes
  float* spare;             // forward: [width padded]
  const float* d;           // backward: [width padded] or null
  const float* d_scale;     // of d, per row, or null
};

// dst = src as an operand; clamped to [low, high] first where there are bounds (NaN stays NaN).
struct ConvertArgs {
  int rows, width;  // padded width
  const float* src;
  std::ptrdiff_t src_stride;
  const float *low, *high;  // [width], or null
  void* dst;
  std::ptrdiff_t dst_stride;  // bytes
};

struct HeadArgs {  // q[r] = bias + h[r] . w
  int rows, width;
  const void* h;
  std::ptrdiff_t h_stride;  // bytes
  const float* w;
  float bias;
  float* q;
};

#define QPILOTS_DTYPES(X) X(kFloat32, "float32") X(kFloat64, "float64") X(kBFloat16, "bfloat16") X(kFloat16, "float16")
enum class DType : std::int64_t { QPILOTS_DTYPES(QPILOTS_ENUMERATOR) };

struct Source {  // a live parameter; null data: absent
  const void* data;
  std::int64_t row_stride, col_stride;  // elements
  DType dtype;
};

inline std::ptrdiff_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// g[i] = sum_j w_j dq[j, i] of the rows [begin, end), with the aggregated value and std of each.
struct CombineArgs {
  int begin, end, members, width, padded_width;
  const SteeringParams* steering;
  const float* q;  // [members, q_stride]
  std::ptrdiff_t q_stride;
  const float* dq;          // [members, q_stride, padded_width]
  const float* a;           // [rows, padded_width], the unclipped estimate
  const float *low, *high;  // [padded_width], the bounds of the actions
  float* weights;           // scratch [members]
  float* g;                 // [rows, padded_width]
  float* value;
  float* std;
};

struct SteerArgs {
  int begin, end, width, padded_width;
  const SteeringParams* steering;
  float weight;               // of the step; multiplies alpha
  const float* alpha;         // [rows], each row's in place of the steering's, or null
  const unsigned char* mask;  // [width] or null
  float* x;
  const float* v;
  const float* g;
  const float* std;  // of row i at std[i * std_stride]
  std::ptrdiff_t std_stride;
  float dt;
  // what is reported, [rows] each, or null
  float* norms;
  unsigned char* nonfinite;
  float* q_std;
  unsigned char* gated;
};

// The activations from this one on have no function of their own with a LayerNorm in one: they run as chains.
inline constexpr Activation kFirstUnfused = Activation::kSelu;
inline constexpr int kFused = static_cast<int>(kFirstUnfused);

struct FormatKernels {
  int a_bytes;        // per element of an operand
  int rows_together;  // that go through a network together, at most: the more, the less often its weights are read
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*activate[kFused][kCount<NormPlacement>])(const ActivateArgs&);
  void (*activate_vjp[kCount<NormPlacement>])(const ActivateVjpArgs&);
  void (*activate_vjp_f32[kCount<NormPlacement>])(const ActivateVjpArgs&);  // dz as plain float32
  void (*chain)(const ChainArgs&);
  void (*chain_vjp)(const ChainArgs&);
  void (*to_operand)(const ConvertArgs&);
  void (*head)(const HeadArgs&);
  void (*pack_panel)(const Block&, const Source&, int panel, char* arena);
};

struct KernelTable {
  const char* name;
  int lanes;
  int panel_width;
  FormatKernels formats[2];
  // dst[0..width) = src (or fill where absent), rounded to bfloat16 on request, zero up to the padded width
  void (*pack_vector)(const Source&, int width, float fill, bool round, float* dst);
  // never 0
  std::uint64_t (*fingerprint)(const void* data, std::ptrdiff_t row_stride_bytes, int rows, std::ptrdiff_t row_bytes);
  void (*combine)(const CombineArgs&);
  void (*posterior_softmax)(const float* q, int count, float scale, float* p);
  void (*steer_velocity)(const SteerArgs&);
  double (*peak)(Format, long iterations);      // flops done by one thread's loop of what the products are made of
  double (*fma_peak)(Format, long iterations);  // the same of multiply-adds on vectors
  float (*read)(const char* data, std::size_t bytes);  // sums a buffer: read bandwidth
};

const KernelTable* table_portable();
const KernelTable* table_avx2();
const KernelTable* table_avx512();
const KernelTable* table_avx512_bf16();
const KernelTable* table_avx512_bf16_zen4();  // the same instructions, arranged for that processor
const KernelTable* table_avx512_amx();        // bfloat16 products on tile registers

}  // namespace qpilots::cpu
