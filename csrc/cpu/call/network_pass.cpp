// A network's two passes over a range of rows, and the memory that they need.
#include <algorithm>

#include "call/network.h"
#include "tuning.h"

namespace qpilots::cpu {

namespace {
int row_pitch(int width) {
  constexpr int kElements = tuning::Call::kRowElements;
  return (width + kElements - 1) / kElements * kElements + kElements;
}
}  // namespace

std::size_t PassScratch::bytes(int rows, int width, bool keeps) {
  const std::size_t pitch = row_pitch(width);
  return (keeps ? 6 : 5) * round_up(4 * pitch * rows, 4096) + round_up(sizeof(void*) * rows, 4096);
}

PassScratch PassScratch::carve(char* memory, int rows, int width, bool keeps) {
  PassScratch s{};
  s.pitch = row_pitch(width);
  const std::size_t each = round_up(4 * s.pitch * rows, 4096);
  s.z = reinterpret_cast<float*>(memory);
  s.operand_bytes = each;
  for (int i = 0; i < 2; ++i) {
    s.operand[i] = memory + (1 + i) * each;
    s.d_operand[i] = memory + (3 + i) * each;
  }
  s.kept = keeps ? reinterpret_cast<float*>(memory + 5 * each) : nullptr;
  s.init = reinterpret_cast<const float**>(memory + (keeps ? 6 : 5) * each);
  return s;
}

// ---------------------------------------------------------------- passes

namespace {

struct SavedRows {
  char *slope, *xhat;
  float* rstd;
  std::ptrdiff_t stride;
};

SavedRows saved_rows(const Network& net, const Network::Layer& layer, const Saves& saves, int row) {
  if (saves.data == nullptr) return {nullptr, nullptr, nullptr, 0};
  const std::size_t first = saves.row + row, all = saves.rows, stride = net.fk().a_bytes * layer.padded_width;
  return {saves.data + layer.slope * all + first * stride, saves.data + layer.xhat * all + first * stride,
          reinterpret_cast<float*>(saves.data + layer.rstd * all) + first, static_cast<std::ptrdiff_t>(stride)};
}

// What both passes of a chain have in common, for the rows [begin, end) of the pass.
ChainArgs chain_args(const Pass& pass, const Network::Layer& layer, const Saves& saves, int begin, int end, void* h,
                     std::ptrdiff_t h_stride) {
  const PassScratch& s = pass.scratch;
  ChainArgs chain{};
  chain.ops = layer.hidden.chain.data();
  chain.count = static_cast<int>(layer.hidden.chain.size());
  chain.rows = end - begin;
  chain.width = layer.width;
  chain.z = s.z + begin * s.pitch;
  chain.z_stride = s.pitch;
  chain.arena = pass.arena;
  chain.kept = s.kept == nullptr ? nullptr : s.kept + begin * s.pitch;
  chain.kept_stride = s.pitch;
  chain.film = pass.film == nullptr ? nullptr : pass.film + begin * pass.film_stride;
  chain.film_stride = pass.film_stride;
  chain.saves = saves.data;
  chain.saved_rows = saves.rows;
  chain.first_saved = saves.row + begin;
  chain.h = h;
  chain.h_stride = h_stride;
  return chain;
}

// Panels of this team member, and the columns that they cover.
struct Share {
  int begin, end, first_column, last_column;
};

Share panel_share(const Team& team, const Block& block) {
  const int begin = team.begin(block.panels), end = team.end(block.panels);
  return {begin, end, std::min(begin * block.panel_width, block.out_padded),
          std::min(end * block.panel_width, block.out_padded)};
}

// dx = delta W for the columns [begin, end), by one of the team: with its share of the forward operands' memory, as no
// operand outlives its pass.
void backward_product(const Pass& pass, const Block& block, const FormatKernels& kernels, int begin, int end, int which,
                      float* dx, std::ptrdiff_t pitch) {
  const PassScratch& s = pass.scratch;
  const std::size_t bytes = 2 * s.operand_bytes / pass.team.size / 64 * 64;
  kernels.backward({&block, pass.arena + block.offset, begin, end, s.d_operand[which], s.d_pitch(), pass.rows, dx,
                    pitch, s.operand[0] + bytes * pass.team.rank, bytes});
}

}  // namespace

void forward_pass(const Pass& pass, InputKind moving, const float* add, Saves saves, float* out,
                  std::ptrdiff_t out_pitch) {
  const Network& net = pass.net;
  const FormatKernels& fk = net.fk();
  const Team& team = pass.team;
  PassScratch& s = pass.scratch;
  const std::ptrdiff_t operand_pitch = s.pitch * fk.a_bytes;
  int current = 0;
  for (int l = 0; l < net.layers(); ++l) {
    const Network::Layer& layer = net.layer(l);
    const bool last = l + 1 == net.layers();
    if (last && net.head()) {
      const int begin = team.begin(pass.rows), end = team.end(pass.rows);
      const float* weight = reinterpret_cast<const float*>(pass.arena + net.head_offset());
      const float bias = *reinterpret_cast<const float*>(pass.arena + layer.bias);
      fk.head({end - begin, net.layer(l - 1).padded_width, s.operand[current] + begin * operand_pitch, operand_pitch,
               weight, bias, out + begin});
      return;
    }
    const Block& block = l == 0 ? net.input(moving) : layer.block;
    const Share share = panel_share(team, block);
    float* z = last ? out : s.z;
    const std::ptrdiff_t z_pitch = last ? out_pitch : s.pitch;
    ForwardArgs product{
        &block, pass.arena + block.offset, share.begin, share.end, s.operand[current], operand_pitch, pass.rows,
        s.init, l == 0 ? add : nullptr,    z,           z_pitch};
    if (l > 0) product.init_shared = reinterpret_cast<const float*>(pass.arena + layer.bias);
    fk.forward(product);
    if (last) return;
    const HiddenShape& hidden = layer.hidden;
    const bool own_columns = !hidden.is_chain && hidden.norm == NormPlacement::kNone;
    if (!own_columns) team.wait();
    const int begin = own_columns ? 0 : team.begin(pass.rows), end = own_columns ? pass.rows : team.end(pass.rows);
    if (hidden.is_chain) {
      ChainArgs chain =
          chain_args(pass, layer, saves, begin, end, s.operand[1 - current] + begin * operand_pitch, operand_pitch);
      chain.spare = reinterpret_cast<float*>(s.d_operand[0] + begin * s.d_pitch());
      fk.chain(chain);
      team.wait();
      current = 1 - current;
      continue;
    }
    const SavedRows saved = saved_rows(net, layer, saves, begin);
    ActivateArgs activate{};
    activate.rows = end - begin;
    activate.width = layer.width;
    activate.begin = own_columns ? share.first_column : 0;
    activate.end = own_columns ? share.last_column : layer.padded_width;
    activate.z = s.z + begin * s.pitch;
    activate.z_stride = s.pitch;
    activate.gamma = reinterpret_cast<const float*>(pass.arena + layer.gamma);
    activate.beta = reinterpret_cast<const float*>(pass.arena + layer.beta);
    activate.layer_norm_eps = hidden.layer_norm_eps;
    activate.h = s.operand[1 - current] + begin * operand_pitch;
    activate.h_stride = operand_pitch;
    activate.slope = saved.slope;
    activate.xhat = saved.xhat;
    activate.rstd = saved.rstd;
    activate.save_stride = saved.stride;
    fk.activate[static_cast<int>(hidden.activation)][static_cast<int>(hidden.norm)](activate);
    team.wait();
    current = 1 - current;
  }
}

int backward_pass(const Pass& pass, const float* d_out, std::ptrdiff_t d_out_pitch, Saves saves, bool as_float) {
  const Network& net = pass.net;
  const FormatKernels& fk = net.fk();
  const Team& team = pass.team;
  PassScratch& s = pass.scratch;
  const std::ptrdiff_t d_pitch = s.d_pitch();
  const int hidden = net.layers() - 1;
  int current = 0;
  if (!net.head()) {
    const int begin = team.begin(pass.rows), end = team.end(pass.rows);
    const bool plain = hidden == 0 && as_float;
    (plain ? net.table().formats[0] : fk)
        .to_operand({end - begin, net.out_padded(), d_out + begin * d_out_pitch, d_out_pitch, nullptr, nullptr,
                     s.d_operand[current] + begin * d_pitch, d_pitch});
    team.wait();
  }
  for (int l = hidden - 1; l >= 0; --l) {
    const Network::Layer& layer = net.layer(l);
    const bool seed = l == hidden - 1 && net.head();
    int first_column = kPad * team.begin(layer.padded_width / kPad);
    int last_column = kPad * team.end(layer.padded_width / kPad);
    if (!seed) {
      backward_product(pass, net.layer(l + 1).block, fk, first_column, last_column, current, s.z, s.pitch);
      current = 1 - current;
    }
    const HiddenShape& shape = layer.hidden;
    const bool own_columns = !shape.is_chain && shape.norm == NormPlacement::kNone;
    if (!own_columns) team.wait();
    const int begin = own_columns ? 0 : team.begin(pass.rows), end = own_columns ? pass.rows : team.end(pass.rows);
    if (shape.is_chain) {
      ChainArgs chain = chain_args(pass, layer, saves, begin, end, s.d_operand[current] + begin * d_pitch, d_pitch);
      if (seed) {
        chain.d = reinterpret_cast<const float*>(pass.arena + net.head_offset());
        chain.d_scale = d_out == nullptr ? nullptr : d_out + begin;
      }
      (l == 0 && as_float ? net.table().formats[0] : fk).chain_vjp(chain);
      team.wait();
      continue;
    }
    const SavedRows saved = saved_rows(net, layer, saves, begin);
    ActivateVjpArgs vjp{};
    vjp.rows = end - begin;
    vjp.width = layer.width;
    vjp.begin = own_columns ? first_column : 0;
    vjp.end = own_columns ? last_column : layer.padded_width;
    vjp.d = seed ? reinterpret_cast<const float*>(pass.arena + net.head_offset()) : s.z + begin * s.pitch;
    vjp.d_stride = seed ? 0 : s.pitch;
    vjp.d_scale = seed && d_out != nullptr ? d_out + begin : nullptr;
    vjp.gamma = reinterpret_cast<const float*>(pass.arena + layer.gamma);
    vjp.slope = saved.slope;
    vjp.xhat = saved.xhat;
    vjp.rstd = saved.rstd;
    vjp.save_stride = saved.stride;
    vjp.dz = s.d_operand[current] + begin * d_pitch;
    vjp.dz_stride = d_pitch;
    const int norm = static_cast<int>(shape.norm);
    (l == 0 && as_float ? fk.activate_vjp_f32 : fk.activate_vjp)[norm](vjp);
    team.wait();
  }
  return current;
}

void input_vjp(const Pass& pass, const Block& block, const FormatKernels& kernels, int which, float* dx,
               std::ptrdiff_t pitch) {
  const int begin = kPad * pass.team.begin(block.in_padded / kPad), end = kPad * pass.team.end(block.in_padded / kPad);
  backward_product(pass, block, kernels, begin, end, which, dx, pitch);
}

}  // namespace qpilots::cpu
