// The sampler's inner loops for the CPU, called by XLA. Each function gives what the plain JAX beside its caller gives:
// `store.py` for write_scores, `sum_tree.py`, which also explains the tree, for the others.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U32 = ffi::Buffer<ffi::U32>;
using Bool = ffi::Buffer<ffi::PRED>;

constexpr int64_t kRadix = 16;
constexpr int kBits = 4;
// Memory that will be written is asked for so many examples ahead.
constexpr int64_t kAhead = 32;
// Draws that go down abreast: each step of one waits for its last, but not for the others'.
constexpr int kAbreast = 8;
// A product with it takes the place of a branch that no processor could predict.
constexpr double kZeroOrOne[] = {0, 1};

static ffi::Error WriteScores(F32, S32, S32 indices, F32 new_scores, S32 step, ffi::Result<F32> score_result,
                              ffi::Result<S32> scored_at_result, ffi::Result<S32> num_rejected,
                              ffi::Result<S32> last_rejected) {
  float* score = score_result->typed_data();
  int32_t* scored_at = scored_at_result->typed_data();
  const int32_t* index = indices.typed_data();
  const int64_t num_examples = score_result->element_count(), count = indices.element_count();
  const int32_t now = *step.typed_data();
  int32_t rejected = 0, largest = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t ahead = index[std::min(i + kAhead, count - 1)];
    if (ahead >= 0 && ahead < num_examples) {
      __builtin_prefetch(score + ahead, 1);
      __builtin_prefetch(scored_at + ahead, 1);
    }
    if (index[i] < 0 || index[i] >= num_examples) continue;
    const float value = new_scores.typed_data()[i];
    if (!(value >= 0) || std::isinf(value)) {
      ++rejected;
      largest = std::max(largest, index[i]);
    } else if (now >= scored_at[index[i]]) {
      score[index[i]] = value;
      scored_at[index[i]] = now;
    }
  }
  *num_rejected->typed_data() = rejected;
  *last_rejected->typed_data() = largest;
  return ffi::Error::Success();
}

// Where each level starts, leaves first, and the end of the last.
static std::vector<int64_t> Starts(int64_t num_leaves) {
  std::vector<int64_t> starts = {0};
  int64_t size = num_leaves;
  do {
    size = (size + kRadix - 1) / kRadix;
    starts.push_back(starts.back() + kRadix * size);
  } while (size > 1);
  return starts;
}

// sums[bit][i]: of the children whose number ends in the bit + 1 bits of i.
struct Node {
  float sums[kBits][kRadix];
  void Load(const float* children) {
    for (int k = 0; k < 16; ++k) sums[3][k] = children[k];
    for (int k = 0; k < 8; ++k) sums[2][k] = sums[3][k] + sums[3][k + 8];
    for (int k = 0; k < 4; ++k) sums[1][k] = sums[2][k] + sums[2][k + 4];
    for (int k = 0; k < 2; ++k) sums[0][k] = sums[1][k] + sums[1][k + 2];
  }
};

static float Sum(const float* children) {
  Node node;
  node.Load(children);
  return node.sums[0][0] + node.sums[0][1];
}

static ffi::Error WriteTree(F32, S32 indices, F32 values, Bool keep_zeros, int64_t num_leaves,
                            ffi::Result<F32> result) {
  float* sums = result->typed_data();
  const int32_t* index = indices.typed_data();
  const int64_t count = indices.element_count();
  const bool keep = *keep_zeros.typed_data();
  const auto starts = Starts(num_leaves);
  std::vector<int32_t> nodes;
  nodes.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t ahead = index[std::min(i + kAhead, count - 1)];
    if (ahead >= 0 && ahead < num_leaves) {
      __builtin_prefetch(sums + ahead, 1);
      if (starts.size() > 2) __builtin_prefetch(sums + starts[1] + ahead / kRadix, 1);
    }
    if (index[i] < 0 || index[i] >= num_leaves || (keep && sums[index[i]] == 0)) continue;
    sums[index[i]] = values.typed_data()[i];
    nodes.push_back(index[i] / kRadix);
  }
  for (size_t level = 0; level + 2 < starts.size(); ++level) {
    const float* children = sums + starts[level];
    float* parents = sums + starts[level + 1];
    const int64_t num_nodes = (starts[level + 1] - starts[level]) / kRadix;
    if (num_nodes <= static_cast<int64_t>(nodes.size())) {
      for (int64_t node = 0; node < num_nodes; ++node) parents[node] = Sum(children + kRadix * node);
      nodes.resize(num_nodes);  // from here on all, whatever they are
    } else {
      for (int32_t& node : nodes) {
        parents[node] = Sum(children + kRadix * node);
        node /= kRadix;
      }
    }
  }
  return ffi::Error::Success();
}

// Word i of `jax.random.bits(key)`: Threefry-2x32 with 20 rounds (Salmon et al. 2011) of the counter i.
static uint32_t RandomWord(const uint32_t* key, uint32_t i) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA};
  uint32_t x = keys[0], y = i + keys[1];
  for (uint32_t group = 0; group < 5; ++group) {
    for (const int rotation : kRotations[group % 2]) {
      x += y;
      y = ((y << rotation) | (y >> (32 - rotation))) ^ x;
    }
    x += keys[(group + 1) % 3];
    y += keys[(group + 2) % 3] + group + 1;
  }
  return x ^ y;
}

// In [0, 1), with 48 bits.
static double Uniform(uint32_t high, uint32_t low) { return (high >> 8) * 0x1p-24 + (low >> 8) * 0x1p-48; }

static ffi::Error DrawLeaves(U32 key_data, F32 tree, S32 count, int64_t num_leaves, bool equally_spaced,
                             ffi::Result<S32> leaves, ffi::Result<F32> values) {
  const uint32_t* key = key_data.typed_data();
  const auto starts = Starts(num_leaves);
  const int num_levels = static_cast<int>(starts.size()) - 1;
  const int64_t batch_size = leaves->element_count();
  const uint32_t num_positions = equally_spaced ? 1 : static_cast<uint32_t>(batch_size);
  const float total = Sum(tree.typed_data() + starts[num_levels - 1]);
  const float spacing = equally_spaced ? total / static_cast<float>(*count.typed_data()) : total;
  const double first_position = Uniform(RandomWord(key, 0), RandomWord(key, 1));
  std::vector<double> position(batch_size);
  int32_t* node = leaves->typed_data();
  float* sum = values->typed_data();
  for (int64_t i = 0; i < batch_size; ++i) {
    const uint32_t word = 2 * static_cast<uint32_t>(i);
    position[i] = spacing * (equally_spaced ? first_position + std::min<int64_t>(i, *count.typed_data() - 1)
                                            : Uniform(RandomWord(key, word), RandomWord(key, word + 1)));
    node[i] = 0;
    sum[i] = total;
  }
  for (int depth = 0; depth < num_levels; ++depth) {
    const float* level = tree.typed_data() + starts[num_levels - 1 - depth];
    const uint32_t multiplier = RandomWord(key, 2 * (num_positions + depth));
    const uint32_t offset = RandomWord(key, 2 * (num_positions + depth) + 1);
    for (int64_t first = 0; first < batch_size; first += kAbreast) {
      const int abreast = static_cast<int>(std::min<int64_t>(kAbreast, batch_size - first));
      Node nodes[kAbreast];
      uint32_t mirrored[kAbreast];
      int32_t branch[kAbreast];
      for (int j = 0; j < abreast; ++j) {
        const uint32_t parent = node[first + j];
        mirrored[j] = (multiplier * parent + offset) >> (32 - kBits);
        branch[j] = 0;
        nodes[j].Load(level + kRadix * static_cast<int64_t>(parent));
      }
      for (int bit = 0; bit < kBits; ++bit) {
        for (int j = 0; j < abreast; ++j) {
          const float left = nodes[j].sums[bit][branch[j]], right = nodes[j].sums[bit][branch[j] + (1 << bit)];
          const double from_start = position[first + j];
          const double place = std::abs(kZeroOrOne[(mirrored[j] >> bit) & 1] * sum[first + j] - from_start);
          // The smaller half has the end that the place is counted from.
          const double smaller = std::min(left, right);
          const int in_smaller = (place < smaller) & (smaller > 0);
          position[first + j] = place - kZeroOrOne[1 - in_smaller] * smaller;
          branch[j] |= (in_smaller == (right < left)) << bit;
          sum[first + j] = nodes[j].sums[bit][branch[j]];
        }
      }
      for (int j = 0; j < abreast; ++j) {
        node[first + j] = static_cast<int32_t>(kRadix * node[first + j] + branch[j]);
        if (depth + 1 < num_levels) {
          __builtin_prefetch(tree.typed_data() + starts[num_levels - 2 - depth] +
                             kRadix * static_cast<int64_t>(node[first + j]));
        }
      }
    }
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(write_scores, WriteScores,
                              ffi::Ffi::Bind()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Ret<F32>()
                                  .Ret<S32>()
                                  .Ret<S32>()
                                  .Ret<S32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    write_tree, WriteTree,
    ffi::Ffi::Bind().Arg<F32>().Arg<S32>().Arg<F32>().Arg<Bool>().Attr<int64_t>("num_leaves").Ret<F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(draw_leaves, DrawLeaves,
                              ffi::Ffi::Bind()
                                  .Arg<U32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Attr<int64_t>("num_leaves")
                                  .Attr<bool>("equally_spaced")
                                  .Ret<S32>()
                                  .Ret<F32>());
