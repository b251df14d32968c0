// A network's memory: where its weights lie, and how they get there.
#include "call/network.h"

#include <algorithm>
#include <utility>

#include "tuning.h"

namespace qpilots::cpu {

Block Network::place(Format format, int in, int out, int column) {
  Block b{};
  b.format = format;
  b.in = in;
  b.out = out;
  b.in_padded = padded(in);
  b.out_padded = padded(out);
  b.panel_width = table_->panel_width;
  b.panels = (b.out_padded + b.panel_width - 1) / b.panel_width;
  const std::size_t element = format == Format::kF32 ? 4 : 2;
  b.panel_stride = round_up(element * b.in_padded * b.panel_width, 64) + tuning::Call::kPanelGap;
  b.offset = member_bytes_;
  b.column = column;
  member_bytes_ = round_up(member_bytes_ + b.panel_stride * b.panels, 64);
  max_padded_ = std::max({max_padded_, b.in_padded, b.out_padded});
  return b;
}

Network::Network(NetworkShape shape, Format format, const KernelTable& table)
    : shape_(std::move(shape)), format_(format), table_(&table) {
  const int count = static_cast<int>(shape_.widths.size());
  head_ = count > 1 && shape_.scalar_head;
  const auto vector = [&](int width) {
    const std::size_t at = member_bytes_;
    member_bytes_ += sizeof(float) * padded(width);
    return at;
  };
  for (int l = 0; l < count; ++l) {
    Layer layer{};
    layer.width = shape_.widths[l];
    layer.padded_width = padded(layer.width);
    layer.bias = vector(layer.width);
    if (l + 1 < count) {
      layer.hidden = shape_.hidden[l];
      for (ChainOp& op : layer.hidden.chain) {
        const bool is_norm = op.kind == RowOpKind::kLayerNorm || op.kind == RowOpKind::kRmsNorm;
        if (is_norm) {
          op.gamma = vector(layer.width);
          op.beta = vector(layer.width);
        }
        if (op.kind == RowOpKind::kFilm) {
          op.film = film_dim_;
          film_dim_ += 2 * layer.width;
        }
        keeps_ = keeps_ || op.kind == RowOpKind::kKeep;
        op.keeps_values = op.kind != RowOpKind::kKeep && op.kind != RowOpKind::kAdd && op.kind != RowOpKind::kFilm;
        op.saved = saves_per_row_;
        if (op.keeps_values) saves_per_row_ += sizeof(float) * layer.padded_width;
      }
      if (!layer.hidden.is_chain) {
        layer.slope = saves_per_row_;
        saves_per_row_ += fk().a_bytes * layer.padded_width;
        if (layer.hidden.norm != NormPlacement::kNone) {
          layer.gamma = vector(layer.width);
          layer.beta = vector(layer.width);
          layer.xhat = saves_per_row_;
          saves_per_row_ += fk().a_bytes * layer.padded_width;
        }
      }
    }
    if (l > 0 && head_ && l + 1 == count) {
      head_weight_ = vector(shape_.widths[l - 1]);
    } else if (l > 0) {
      layer.block = place(format_, shape_.widths[l - 1], layer.width, 0);
    } else {
      for (int kind = 0; kind < kInputKinds; ++kind) {
        if (shape_.input_dims[kind] == 0) continue;
        // what is computed once a call stays float32: it costs nothing, and rounding t alone moves an action by 1e-3
        const bool moving = kind == kX || kind == kXbar;
        inputs_[kind] =
            place(moving ? format_ : Format::kF32, shape_.input_dims[kind], layer.width, shape_.input_columns[kind]);
      }
    }
    layers_.push_back(layer);
  }
  for (Layer& layer : layers_) {  // behind the rows, which stay aligned whatever their number
    layer.rstd = saves_per_row_;
    if (layer.hidden.norm != NormPlacement::kNone) saves_per_row_ += sizeof(float);
    for (ChainOp& op : layer.hidden.chain) {
      op.rstd = saves_per_row_;
      if (op.kind == RowOpKind::kLayerNorm || op.kind == RowOpKind::kRmsNorm) saves_per_row_ += sizeof(float);
    }
  }
  ChainOp *kept = nullptr, *added = nullptr;
  for (Layer& layer : layers_) {
    for (ChainOp& op : layer.hidden.chain) {
      if (op.kind == RowOpKind::kKeep) {
        kept = &op;
        added = nullptr;
      } else if (op.kind == RowOpKind::kAdd) {
        kept->is_added = true;
        if (added != nullptr) added->is_added = true;
        added = &op;
      }
    }
  }
  member_bytes_ = round_up(member_bytes_, 4096) + 4096;
  for (int member = 0; member < shape_.members; ++member) {
    units_.push_back({member, 0, 0, -1});
    for (int l = 0; l < count; ++l) {
      if (l > 0) {
        if (head_ && l + 1 == count) continue;
        for (int p = 0; p < layers_[l].block.panels; ++p) units_.push_back({member, l, 0, p});
        continue;
      }
      for (int kind = 0; kind < kInputKinds; ++kind) {
        if (shape_.input_dims[kind] == 0) continue;
        for (int p = 0; p < inputs_[kind].panels; ++p) units_.push_back({member, 0, kind, p});
      }
    }
  }
}

void Network::pack(int unit, const LayerSource* sources, char* arena) const {
  const Unit& u = units_[unit];
  char* member = arena + member_bytes_ * u.member;
  const LayerSource* own = sources + static_cast<std::size_t>(u.member) * layers_.size();
  if (u.panel >= 0) {
    const Block& block = u.layer > 0 ? layers_[u.layer].block : inputs_[u.input];
    table_->formats[static_cast<int>(block.format)].pack_panel(block, own[u.layer].weight, u.panel, member);
    return;
  }
  const auto vector = [&](const Source& source, int width, float fill, bool round, std::size_t at) {
    table_->pack_vector(source, width, fill, round, reinterpret_cast<float*>(member + at));
  };
  for (int l = 0; l < layers(); ++l) {
    const Layer& layer = layers_[l];
    vector(own[l].bias, layer.width, 0.0f, false, layer.bias);
    if (layer.hidden.norm != NormPlacement::kNone) {
      vector(own[l].gamma[0], layer.width, 1.0f, false, layer.gamma);
      vector(own[l].beta[0], layer.width, 0.0f, false, layer.beta);
    }
    int norms = 0;
    for (const ChainOp& op : layer.hidden.chain) {
      if (op.kind != RowOpKind::kLayerNorm && op.kind != RowOpKind::kRmsNorm) continue;
      vector(own[l].gamma[norms], layer.width, 1.0f, false, op.gamma);
      vector(own[l].beta[norms], layer.width, 0.0f, false, op.beta);
      ++norms;
    }
  }
  if (head_) {
    Source row = own[layers() - 1].weight;
    row.row_stride = row.col_stride;
    vector(row, layers_[layers() - 2].width, 0.0f, format_ == Format::kBf16, head_weight_);
  }
}

bool Network::refresh(int unit, const LayerSource* sources, char* arena, std::uint64_t* fingerprints) const {
  const Unit& u = units_[unit];
  if (u.panel < 0) {
    pack(unit, sources, arena);
    return false;
  }
  const Source& source = sources[static_cast<std::size_t>(u.member) * layers_.size() + u.layer].weight;
  const Block& block = u.layer > 0 ? layers_[u.layer].block : inputs_[u.input];
  const std::ptrdiff_t element = element_bytes(source.dtype);
  const int first = u.panel * block.panel_width, rows = std::min(block.panel_width, block.out - first);
  const char* data =
      static_cast<const char*>(source.data) + (first * source.row_stride + block.column * source.col_stride) * element;
  std::uint64_t now = 0;
  if (source.col_stride == 1) {
    now = table_->fingerprint(data, source.row_stride * element, rows, block.in * element);
  } else if (source.row_stride == 1) {
    now = table_->fingerprint(data, source.col_stride * element, block.in, rows * element);
  }
  if (now != 0 && now == fingerprints[unit]) return false;
  fingerprints[unit] = now;
  pack(unit, sources, arena);
  return true;
}

std::vector<Interval> Network::panel_memory(const LayerSource* sources) const {
  std::vector<Interval> memory;
  for (int i = 0; i < shape_.members * layers(); ++i) {
    const int l = i % layers();
    if (l > 0 && head_ && l + 1 == layers()) continue;
    const Source& source = sources[i].weight;
    const Block& block = layers_[l].block;
    int in = block.in, out = layers_[l].width;
    if (l == 0) {
      for (const Block& input : inputs_) in = std::max(in, input.column + input.in);
    }
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(source.data);
    const std::int64_t last = (out - 1) * source.row_stride + (in - 1) * source.col_stride;
    memory.push_back({begin, begin + static_cast<std::uintptr_t>((last + 1) * element_bytes(source.dtype))});
  }
  return memory;
}

}  // namespace qpilots::cpu
