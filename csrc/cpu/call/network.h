// A packed network: where everything lies in a member's arena, and how a range of rows walks through it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "call/parallel.h"
#include "kernels.h"
#include "live/write_watch.h"
#include "qpilots/types.h"

namespace qpilots::cpu {

#define QPILOTS_INPUT_KINDS(X) \
  X(kObs, "obs") X(kX, "x") /* (noisy) actions */ X(kXbar, "xbar") X(kT, "t") X(kS, "s") X(kU, "u")
enum InputKind { QPILOTS_INPUT_KINDS(QPILOTS_ENUMERATOR) kInputKinds };

inline constexpr int kMostNorms = 3;  // in one layer

inline std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

// What is done to the rows of a hidden Linear: an activation with at most one LayerNorm, or a chain.
struct HiddenShape {
  Activation activation = Activation::kGeluTanh;
  NormPlacement norm = NormPlacement::kNone;
  float layer_norm_eps = 1e-6f;
  bool is_chain = false;
  std::vector<ChainOp> chain;  // kind, activation and numbers; the network fills in the rest
};

struct NetworkShape {
  int members = 1;
  std::vector<int> widths;  // hidden widths, then the output width
  std::vector<HiddenShape> hidden;
  bool scalar_head = false;          // a critic: its last layer is one dot product a row
  int input_dims[kInputKinds] = {};  // 0: absent
  int input_columns[kInputKinds] = {};
};

// One live Linear of one member with its norms.
struct LayerSource {
  Source weight, bias, gamma[kMostNorms], beta[kMostNorms];
};

class Network {
 public:
  struct Layer {
    int width, padded_width;
    HiddenShape hidden;                         // of the last layer: not used
    Block block;                                // unused in the first layer, which has one block per input
    std::size_t bias = 0, gamma = 0, beta = 0;  // bytes, within a member's arena
    std::size_t slope = 0, xhat = 0, rstd = 0;  // bytes per saved row, within saves
  };

  Network(NetworkShape shape, Format format, const KernelTable& table);

  const NetworkShape& shape() const { return shape_; }
  const KernelTable& table() const { return *table_; }
  Format format() const { return format_; }
  const FormatKernels& fk() const { return table_->formats[static_cast<int>(format_)]; }
  int layers() const { return static_cast<int>(layers_.size()); }
  const Layer& layer(int l) const { return layers_[l]; }
  const Block& input(InputKind kind) const { return inputs_[kind]; }
  bool has(InputKind kind) const { return shape_.input_dims[kind] > 0; }
  bool keeps() const { return keeps_; }       // some chain keeps rows
  int film_dim() const { return film_dim_; }  // numbers that the chains read at a time
  bool head() const { return head_; }         // the output is one number: a dot product
  int out_padded() const { return layers_.back().padded_width; }
  int first_padded() const { return layers_.front().padded_width; }
  int max_padded() const { return max_padded_; }
  std::size_t member_bytes() const { return member_bytes_; }
  std::size_t arena_bytes() const { return member_bytes_ * shape_.members; }
  std::size_t saves_bytes(int rows) const { return saves_per_row_ * rows; }
  std::size_t head_offset() const { return head_weight_; }

  // Packing, in independent units [0, pack_units()) of any order. sources: [members][layers].
  int pack_units() const { return static_cast<int>(units_.size()); }
  void pack(int unit, const LayerSource* sources, char* arena) const;
  // The same, but leaves a unit alone whose source has the fingerprint of the last time (0: never packed). Returns
  // whether a panel was packed; a member's vectors always are.
  bool refresh(int unit, const LayerSource* sources, char* arena, std::uint64_t* fingerprints) const;
  bool panel_unit(int unit) const { return units_[unit].panel >= 0; }
  // The memory that the panels come from.
  std::vector<Interval> panel_memory(const LayerSource* sources) const;

 private:
  struct Unit {
    int member, layer, input, panel;  // panel < 0: the member's vectors
  };
  Block place(Format format, int in, int out, int column);

  NetworkShape shape_;
  Format format_;
  const KernelTable* table_;
  std::vector<Layer> layers_;
  Block inputs_[kInputKinds] = {};
  bool head_ = false, keeps_ = false;
  int film_dim_ = 0;
  std::size_t head_weight_ = 0;
  int max_padded_ = kPad;
  std::size_t member_bytes_ = 0;
  std::size_t saves_per_row_ = 0;
  std::vector<Unit> units_;
};

// Buffers of one team for one range of rows; each is [capacity rows, max padded width] elements of 4 bytes.
struct PassScratch {
  float* z;
  char* operand[2];           // forward operands, side by side; scratch of the products in the backward pass
  std::size_t operand_bytes;  // of each
  char* d_operand[2];         // backward operands
  float* kept;                // of chains: kept rows, then their cotangents; null where no network keeps any
  const float** init;         // [capacity]
  std::ptrdiff_t pitch;       // elements

  // bytes between rows of d_operand: whatever the format, a delta may be float32
  std::ptrdiff_t d_pitch() const { return pitch * static_cast<std::ptrdiff_t>(sizeof(float)); }

  static std::size_t bytes(int rows, int width, bool keeps);
  static PassScratch carve(char* memory, int rows, int width, bool keeps);
};

// What the derivative of a range of rows needs, for `rows` saved rows in all, of which the range starts at `row`.
struct Saves {
  char* data = nullptr;
  int rows = 0;
  int row = 0;
};

struct Pass {  // one range of rows through one member
  const Network& net;
  const char* arena;  // the member's
  const Team& team;
  PassScratch& scratch;
  int rows;
  const float* film = nullptr;  // of row r at film + r film_stride
  std::ptrdiff_t film_stride = 0;
};

// The first layer's sum starts from scratch.init[r] (+ add) and adds the block `moving` of scratch.operand[0].
// out: [rows, out_pitch], or with a head q[rows]. saves.data may be null. All of the team must call; ends
// unsynchronised.
void forward_pass(const Pass& pass, InputKind moving, const float* add, Saves saves, float* out,
                  std::ptrdiff_t out_pitch);

// From dL/d(output) [rows, pitch] (for a head: a scale per row, or null for 1) down to the first layer's delta, left as
// a backward operand in scratch.d_operand[return value], or with as_float in float32.
int backward_pass(const Pass& pass, const float* d_out, std::ptrdiff_t d_out_pitch, Saves saves, bool as_float);

// dx[rows, pitch] = delta W_block, delta being the backward operand in scratch.d_operand[which].
void input_vjp(const Pass& pass, const Block& block, const FormatKernels& kernels, int which, float* dx,
               std::ptrdiff_t pitch);

}  // namespace qpilots::cpu
