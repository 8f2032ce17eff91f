// Inner loops of the sampler for the CPU, called by XLA. Each function equals the plain JAX beside its caller: `store.py`
// for the scores, `uniform.py` for the uniform draw, `visits.py` for deadlines, and `sum_tree.py` for the rest. Trees are
// those of `levels.py`.
// Each checks the extents of all its arrays, and reads and writes nothing outside them, whatever they hold.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U32 = ffi::Buffer<ffi::U32>;
using Bool = ffi::Buffer<ffi::PRED>;

constexpr int64_t kRadix = 16;
constexpr int kBits = 4;
constexpr int64_t kMaxExamples = int64_t{1} << 30;
constexpr int32_t kMaxStep = 1 << 30;
// Leaves that are not zero lie between.
constexpr float kSmallest = 0x1p-64f, kLargest = 0x1p64f;
constexpr float kFinite = 0x1.fffffep127f;
constexpr int32_t kNever = -1;
// Distance of prefetching, in examples.
constexpr size_t kAhead = 32;
// Draws that descend together.
constexpr int kAbreast = 16;

#define REQUIRE(condition) \
  if (!(condition)) return ffi::Error::InvalidArgument(std::string(__func__) + " of the sampler needs " #condition)

static ffi::Error ReadScores(F32 score, S32 scored_at, S32 indices, ffi::Result<F32> score_result,
                             ffi::Result<S32> scored_at_result) {
  const int64_t num_examples = score.element_count();
  const size_t count = indices.element_count();
  REQUIRE(num_examples >= 1 && num_examples <= kMaxExamples);
  REQUIRE(static_cast<int64_t>(scored_at.element_count()) == num_examples);
  REQUIRE(score_result->element_count() == count && scored_at_result->element_count() == count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t ahead = std::clamp<int64_t>(indices.typed_data()[std::min(i + kAhead, count - 1)], 0, num_examples - 1);
    __builtin_prefetch(score.typed_data() + ahead);
    __builtin_prefetch(scored_at.typed_data() + ahead);
    const int64_t index = indices.typed_data()[i];
    const int64_t place = std::clamp<int64_t>(index, 0, num_examples - 1);
    const float found = score.typed_data()[place];
    const int32_t found_at = scored_at.typed_data()[place];
    score_result->typed_data()[i] = place == index ? found : 0;
    scored_at_result->typed_data()[i] = place == index ? found_at : kNever;
  }
  return ffi::Error::Success();
}

static ffi::Error WriteScores(F32, S32, S32 indices, F32 new_scores, S32 step, ffi::Result<F32> score_result,
                              ffi::Result<S32> scored_at_result, ffi::Result<S32> num_rejected,
                              ffi::Result<S32> last_rejected) {
  float* score = score_result->typed_data();
  int32_t* scored_at = scored_at_result->typed_data();
  const int32_t* index = indices.typed_data();
  const int64_t num_examples = score_result->element_count();
  const size_t count = indices.element_count();
  REQUIRE(num_examples >= 1 && num_examples <= kMaxExamples);
  REQUIRE(static_cast<int64_t>(scored_at_result->element_count()) == num_examples);
  REQUIRE(new_scores.element_count() == count && step.element_count() == 1);
  REQUIRE(num_rejected->element_count() == 1 && last_rejected->element_count() == 1);
  const int32_t now = *step.typed_data();
  const float finite = now >= 0 && now < kMaxStep ? kFinite : -1;  // of an impossible step all are rejected
  int32_t rejected = 0, largest = -1;
  for (size_t i = 0; i < count; ++i) {
    const int64_t ahead = index[std::min(i + kAhead, count - 1)];
    if (ahead >= 0 && ahead < num_examples) {
      __builtin_prefetch(score + ahead, 1);
      __builtin_prefetch(scored_at + ahead, 1);
    }
    if (index[i] < 0 || index[i] >= num_examples) continue;
    const float value = new_scores.typed_data()[i];
    if (!(value >= 0 && value <= finite)) {
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

// Returns the start of each level, leaves first, and the end of the last.
static std::vector<int64_t> Starts(int64_t num_leaves) {
  std::vector<int64_t> starts = {0};
  int64_t size = num_leaves;
  do {
    size = (size + kRadix - 1) / kRadix;
    starts.push_back(starts.back() + kRadix * size);
  } while (size > 1);
  return starts;
}

// Returns the number of nodes of each level that are no padding, leaves first, up to 1.
static std::vector<int64_t> Sizes(int64_t num_leaves) {
  std::vector<int64_t> sizes = {num_leaves};
  do {
    sizes.push_back((sizes.back() + kRadix - 1) / kRadix);
  } while (sizes.back() > 1);
  return sizes;
}

// A vector of four numbers, which GCC and Clang support on every processor.
typedef float Four __attribute__((vector_size(16), aligned(4)));
typedef int32_t FourInts __attribute__((vector_size(16), aligned(4)));
typedef uint32_t FourTimes __attribute__((vector_size(16), aligned(4)));

static float Sum(const float* children) {
  const Four* x = reinterpret_cast<const Four*>(children);
  const Four sum = (x[0] + x[2]) + (x[1] + x[3]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

struct Node {
  const float* children;
  float sums[kRadix];  // from index 2: 2 sums of eight children; from 4: 4 sums of four; from 8: 8 sums of two

  void Load(const float* from) {
    children = from;
    const Four* x = reinterpret_cast<const Four*>(from);
    Four* pairs = reinterpret_cast<Four*>(sums);
    pairs[2] = x[0] + x[2];
    pairs[3] = x[1] + x[3];
    pairs[1] = pairs[2] + pairs[3];
    sums[2] = sums[4] + sums[6];
    sums[3] = sums[5] + sums[7];
  }

  // Sums of the children whose number has the same last bit + 1 bits.
  const float* Sums(int bit) const { return bit + 1 < kBits ? sums + (2 << bit) : children; }
};

// Returns whether a number >= 0 is not zero. XLA's threads compare subnormal numbers as if they were.
static bool IsPositive(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits > 0;
}

// Computes again all numbers above the leaves whose nodes are given, as long as they change; by `combine(children, node,
// level)`.
template <typename T, typename Combine>
static void Recombine(T* tree, const std::vector<int64_t>& starts, std::vector<int32_t>& nodes, Combine combine) {
  for (size_t level = 0; level + 2 < starts.size(); ++level) {
    const T* children = tree + starts[level];
    T* parents = tree + starts[level + 1];
    const int64_t num_nodes = (starts[level + 1] - starts[level]) / kRadix;
    if (num_nodes <= static_cast<int64_t>(nodes.size())) {
      for (int64_t node = 0; node < num_nodes; ++node) parents[node] = combine(children + kRadix * node, node, level);
      nodes.resize(num_nodes);  // from here on all nodes of each level are computed
    } else {
      size_t num_changed = 0;
      for (size_t i = 0; i < nodes.size(); ++i) {
        __builtin_prefetch(children + kRadix * nodes[std::min(i + kAhead, nodes.size() - 1)]);
        T& parent = parents[nodes[i]];
        const T before = parent;
        parent = combine(children + kRadix * nodes[i], nodes[i], level);
        nodes[num_changed] = nodes[i] / kRadix;
        num_changed += parent != before;
      }
      nodes.resize(num_changed);
    }
  }
}

static ffi::Error WriteTree(F32, S32 indices, F32 values, Bool keep_zeros, int64_t num_leaves,
                            ffi::Result<F32> result, ffi::Result<S32> num_rejected) {
  float* sums = result->typed_data();
  const int32_t* index = indices.typed_data();
  const size_t count = indices.element_count();
  REQUIRE(num_leaves >= 1 && num_leaves <= kMaxExamples);
  const auto starts = Starts(num_leaves);
  REQUIRE(static_cast<int64_t>(result->element_count()) == starts.back());
  REQUIRE(values.element_count() == count && keep_zeros.element_count() == 1 && num_rejected->element_count() == 1);
  const bool keep = *keep_zeros.typed_data();
  // Values first, without branches, so that the loop vectorizes: the number to write, or NaN to leave a leaf as it is.
  std::vector<float> leaves(count);
  int32_t rejected = 0;
  for (size_t i = 0; i < count; ++i) {
    const float value = values.typed_data()[i];
    const bool valid = (value >= 0) & (value <= kFinite);
    const float clipped = std::min(std::max(value, kSmallest), kLargest);
    leaves[i] = valid ? (IsPositive(value) ? clipped : 0) : NAN;
    rejected += !valid & (index[i] >= 0) & (index[i] < num_leaves);
  }
  std::vector<int32_t> nodes;
  nodes.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t ahead = index[std::min(i + kAhead, count - 1)];
    if (ahead >= 0 && ahead < num_leaves) {
      __builtin_prefetch(sums + ahead, 1);
      if (starts.size() > 2) __builtin_prefetch(sums + starts[1] + ahead / kRadix, 1);
    }
    if (index[i] < 0 || index[i] >= num_leaves || std::isnan(leaves[i]) || (keep && sums[index[i]] == 0)) continue;
    sums[index[i]] = leaves[i];
    nodes.push_back(index[i] / kRadix);
  }
  Recombine(sums, starts, nodes, [](const float* children, int64_t, int64_t) { return Sum(children); });
  *num_rejected->typed_data() = rejected;
  return ffi::Error::Success();
}

// Returns word i of `jax.random.bits(key)`: Threefry-2x32 with 20 rounds (Salmon et al. 2011) of the counter i.
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

// Returns a number in [0, limit): the upper half of limit times 64 random bits.
static int64_t Below(uint64_t limit, uint64_t high, uint64_t low) {
  return static_cast<int64_t>((high * limit + (low * limit >> 32)) >> 32);
}

static ffi::Error DrawUniform(U32 key_data, int64_t num_examples, bool in_parts, ffi::Result<S32> result) {
  const int64_t batch_size = result->element_count();
  REQUIRE(key_data.element_count() == 2);
  REQUIRE(num_examples >= 1 && num_examples <= kMaxExamples && batch_size <= kMaxExamples);
  for (int64_t i = 0; i < batch_size; ++i) {
    const int64_t cell = Below(num_examples, RandomWord(key_data.typed_data(), static_cast<uint32_t>(i)),
                               RandomWord(key_data.typed_data(), static_cast<uint32_t>(batch_size + i)));
    result->typed_data()[i] = static_cast<int32_t>(in_parts ? (i * num_examples + cell) / batch_size : cell);
  }
  return ffi::Error::Success();
}

// Returns a number in [0, 1) with 48 bits.
static double Uniform(uint32_t high, uint32_t low) { return (high >> 8) * 0x1p-24 + (low >> 8) * 0x1p-48; }

// Draws that descend together, without branches: no processor could predict them, and without them loops vectorize.
struct Rank {
  double position[kAbreast];
  float sum[kAbreast];
  int32_t node[kAbreast];

  // Moves each draw from its node, whose sum is `sum`, to one of the children.
  void Descend(const float* level, uint32_t multiplier, uint32_t offset, const float* below, int32_t last) {
    Node nodes[kAbreast];
    uint32_t mirrored[kAbreast];
    int32_t branch[kAbreast] = {};
    for (int j = 0; j < kAbreast; ++j) {
      mirrored[j] = (multiplier * static_cast<uint32_t>(node[j]) + offset) >> (32 - kBits);
      nodes[j].Load(level + kRadix * static_cast<int64_t>(node[j]));
    }
    for (int bit = 0; bit < kBits; ++bit) {
      float left[kAbreast], right[kAbreast];
      for (int j = 0; j < kAbreast; ++j) {
        left[j] = nodes[j].Sums(bit)[branch[j]];
        right[j] = nodes[j].Sums(bit)[branch[j] + (1 << bit)];
      }
      for (int j = 0; j < kAbreast; ++j) {
        const float is_mirrored = static_cast<float>(static_cast<int32_t>((mirrored[j] >> bit) & 1));
        double place = std::fabs(static_cast<double>(is_mirrored * sum[j]) - position[j]);
        // The sum is rounded: else positions beyond the halves would fall to a small leaf, or some would be missing.
        place *= (static_cast<double>(left[j]) + static_cast<double>(right[j])) / static_cast<double>(sum[j]);
        // Positions are counted from the end of the smaller half.
        const float smaller = left[j] < right[j] ? left[j] : right[j];
        const int32_t in_smaller = (place < static_cast<double>(smaller)) & (smaller > 0);
        const int32_t to_right = in_smaller == (right[j] < left[j]);
        position[j] = place - (in_smaller ? 0.0 : static_cast<double>(smaller));
        branch[j] |= to_right << bit;
        sum[j] = to_right ? right[j] : left[j];
      }
    }
    for (int j = 0; j < kAbreast; ++j) {
      // Padding is zero and never chosen, unless the tree is not one that was built and written here.
      node[j] = std::min(static_cast<int32_t>(kRadix) * node[j] + branch[j], last);
      if (below != nullptr) __builtin_prefetch(below + kRadix * static_cast<int64_t>(node[j]));
    }
  }
};

static ffi::Error DrawLeaves(U32 key_data, F32 tree, S32 count, int64_t num_leaves, bool equally_spaced,
                             ffi::Result<S32> leaves, ffi::Result<F32> values) {
  const uint32_t* key = key_data.typed_data();
  REQUIRE(num_leaves >= 1 && num_leaves <= kMaxExamples);
  const auto starts = Starts(num_leaves);
  REQUIRE(static_cast<int64_t>(tree.element_count()) == starts.back());
  REQUIRE(key_data.element_count() == 2 && count.element_count() == 1);
  REQUIRE(values->element_count() == leaves->element_count());
  const int num_levels = static_cast<int>(starts.size()) - 1;
  const int64_t batch_size = leaves->element_count();
  REQUIRE(batch_size >= 1 && batch_size <= kMaxExamples);
  const int64_t num_places = equally_spaced ? std::clamp<int64_t>(*count.typed_data(), 1, batch_size) : batch_size;
  const uint32_t num_positions = equally_spaced ? 1 : static_cast<uint32_t>(batch_size);
  const float total = Sum(tree.typed_data() + starts[num_levels - 1]);
  const float spacing = equally_spaced ? total / static_cast<float>(num_places) : total;
  std::vector<uint32_t> words(2 * (static_cast<size_t>(num_positions) + num_levels));
  for (size_t i = 0; i < words.size(); ++i) words[i] = RandomWord(key, static_cast<uint32_t>(i));
  const uint32_t* orders = &words[2 * num_positions];  // one order for each level
  // Places after the last repeat it, so that all ranks are full.
  const int64_t num_ranks = (batch_size + kAbreast - 1) / kAbreast;
  std::vector<Rank> ranks(num_ranks);
  for (int64_t i = 0; i < num_ranks * kAbreast; ++i) {
    Rank& rank = ranks[i / kAbreast];
    const int64_t place = std::min<int64_t>(i, num_places - 1);
    const uint32_t* word = &words[equally_spaced ? 0 : 2 * place];
    rank.position[i % kAbreast] = spacing * (Uniform(word[0], word[1]) + (equally_spaced ? place : 0));
    rank.node[i % kAbreast] = 0;
    rank.sum[i % kAbreast] = total;
  }
  const auto sizes = Sizes(num_leaves);
  for (int depth = 0; depth < num_levels; ++depth) {
    const int32_t last = static_cast<int32_t>(sizes[num_levels - 1 - depth] - 1);
    const float* level = tree.typed_data() + starts[num_levels - 1 - depth];
    const float* below = depth + 1 < num_levels ? tree.typed_data() + starts[num_levels - 2 - depth] : nullptr;
    for (Rank& rank : ranks) rank.Descend(level, orders[2 * depth], orders[2 * depth + 1], below, last);
  }
  for (int64_t i = 0; i < batch_size; ++i) {
    const float value = ranks[i / kAbreast].sum[i % kAbreast];
    int64_t leaf = ranks[i / kAbreast].node[i % kAbreast];
    const bool is_drawable = value > 0 && value <= kFinite;
    if (!is_drawable) {  // all leaves are zero: every one with the same probability
      const uint32_t* word = &words[equally_spaced ? 0 : 2 * i];
      const int64_t cell = Below(num_leaves, word[0], word[1]);
      leaf = equally_spaced ? (i * num_leaves + cell) / batch_size : cell;
    }
    leaves->typed_data()[i] = static_cast<int32_t>(leaf);
    values->typed_data()[i] = is_drawable ? value : 0;
  }
  return ffi::Error::Success();
}

// Distance of a deadline from now: times wrap around.
static int32_t Distance(int32_t time, int32_t now) {
  return static_cast<int32_t>(static_cast<uint32_t>(time) - static_cast<uint32_t>(now));
}

static int32_t Later(int32_t time, int64_t by) {
  return static_cast<int32_t>(static_cast<uint32_t>(time) + static_cast<uint32_t>(by));
}

// Writes deadlines of leaves in [0, N), and the minima above them.
static void WriteMinima(int32_t* tree, int64_t num_leaves, const std::vector<int32_t>& leaves,
                        const std::vector<int32_t>& deadlines, int32_t now) {
  std::vector<int32_t> nodes(leaves.size());
  for (size_t i = 0; i < leaves.size(); ++i) {
    __builtin_prefetch(tree + leaves[std::min(i + kAhead, leaves.size() - 1)], 1);
    tree[leaves[i]] = deadlines[i];
    nodes[i] = leaves[i] / kRadix;
  }
  const auto sizes = Sizes(num_leaves);
  Recombine(tree, Starts(num_leaves), nodes, [&](const int32_t* children, int64_t node, size_t level) {
    int32_t earliest = std::numeric_limits<int32_t>::max();
    const int64_t count = std::min(kRadix, sizes[level] - kRadix * node);
    if (count == kRadix) {  // of a known number, so that the loop vectorizes
      for (int64_t i = 0; i < kRadix; ++i) earliest = std::min(earliest, Distance(children[i], now));
      return Later(now, earliest);
    }
    for (int64_t i = 0; i < count; ++i) earliest = std::min(earliest, Distance(children[i], now));
    return Later(now, earliest);
  });
}

#define REQUIRE_TREE(tree, num_leaves)                        \
  REQUIRE(num_leaves >= 1 && num_leaves <= kMaxExamples);     \
  REQUIRE(static_cast<int64_t>((tree).element_count()) == Starts(num_leaves).back())

static void KeepSmallest(std::vector<uint64_t>& numbers, int64_t count) {
  std::nth_element(numbers.begin(), numbers.begin() + count, numbers.end());
  numbers.resize(count);
}

// Returns a bit for each of 16 deadlines, set if it is at most `latest` visits from now.
static uint32_t DueWithin(const int32_t* deadlines, int32_t now, int32_t latest) {
  const auto* four = reinterpret_cast<const FourTimes*>(deadlines);
  FourInts due = {};
  for (int i = 0; i < 4; ++i) {
    const auto distance = reinterpret_cast<FourInts>(four[i] - static_cast<uint32_t>(now));
    due |= (distance <= latest) & (FourInts{1, 2, 4, 8} << (4 * i));
  }
  return static_cast<uint32_t>(due[0] | due[1] | due[2] | due[3]);
}

// Returns the leaves whose deadline is at most `latest` visits from now, or the B earliest of them and perhaps others,
// each as one number in the order of the draw: its distance from now, then the exclusive or of index and salt.
static std::vector<uint64_t> LeavesWithin(const int32_t* tree, const std::vector<int64_t>& starts,
                                          const std::vector<int64_t>& sizes, int32_t now, uint32_t salt,
                                          int32_t latest, int64_t batch_size) {
  uint32_t mask = 0;
  std::vector<uint64_t> nodes = {0}, children;
  for (int level = static_cast<int>(sizes.size()) - 2; level >= 0; --level) {
    const int32_t* numbers = tree + starts[level];
    const uint32_t child_mask = salt >> (kBits * level);
    children.clear();
    for (size_t i = 0; i < nodes.size(); ++i) {
      const int64_t ahead = static_cast<uint32_t>(nodes[std::min(i + kAhead, nodes.size() - 1)]) ^ mask;
      __builtin_prefetch(numbers + kRadix * ahead);
      const int64_t first = kRadix * static_cast<int64_t>(static_cast<uint32_t>(nodes[i]) ^ mask);
      uint32_t due = DueWithin(numbers + first, now, latest);
      for (due &= (uint32_t{1} << std::min(sizes[level] - first, kRadix)) - 1; due != 0; due &= due - 1) {
        const int64_t child = first + __builtin_ctz(due);
        const uint32_t key = static_cast<uint32_t>(Distance(numbers[child], now)) ^ 0x80000000;
        children.push_back(static_cast<uint64_t>(key) << 32 | (static_cast<uint32_t>(child) ^ child_mask));
      }
    }
    // Those of the earliest minima are above the earliest leaves.
    if (static_cast<int64_t>(children.size()) > 4 * batch_size) {
      KeepSmallest(children, batch_size);
      latest = static_cast<int32_t>(*std::max_element(children.begin(), children.end()) >> 32 ^ 0x80000000);
    }
    nodes.swap(children);
    mask = child_mask;
  }
  return nodes;
}

static ffi::Error DrawEarliest(S32 tree, S32 visited_at, S32 now_, U32 salt_, ffi::Result<S32> leaves,
                               ffi::Result<S32> elapsed) {
  const int64_t num_leaves = visited_at.element_count();
  const int64_t batch_size = leaves->element_count();
  REQUIRE_TREE(tree, num_leaves);
  REQUIRE(now_.element_count() == 1 && salt_.element_count() == 1);
  REQUIRE(batch_size >= 1 && batch_size <= num_leaves);
  REQUIRE(static_cast<int64_t>(elapsed->element_count()) == batch_size);
  const int32_t now = *now_.typed_data();
  const uint32_t salt = *salt_.typed_data() & 0x7fffffff;
  const auto starts = Starts(num_leaves);
  const auto sizes = Sizes(num_leaves);
  // In balance, as many are due within B visits: somewhat more are looked at, and more if need be.
  std::vector<uint64_t> nodes;
  constexpr int64_t kAny = std::numeric_limits<int32_t>::max();
  for (int64_t within = batch_size + batch_size / 4; static_cast<int64_t>(nodes.size()) < batch_size; within *= 16) {
    const auto latest = static_cast<int32_t>(std::min(within, kAny));
    nodes = LeavesWithin(tree.typed_data(), starts, sizes, now, salt, latest, batch_size);
    if (latest == kAny) break;
  }
  if (static_cast<int64_t>(nodes.size()) > batch_size) KeepSmallest(nodes, batch_size);
  std::sort(nodes.begin(), nodes.end());
  for (int64_t i = 0; i < batch_size; ++i) {
    // Of a tree that was not built and written here, there may be too few.
    const int64_t found = i < static_cast<int64_t>(nodes.size()) ? static_cast<uint32_t>(nodes[i]) ^ salt : 0;
    const int64_t leaf = std::min(found, num_leaves - 1);
    leaves->typed_data()[i] = static_cast<int32_t>(leaf);
    elapsed->typed_data()[i] = Distance(Later(now, i), visited_at.typed_data()[leaf]);
  }
  return ffi::Error::Success();
}

static ffi::Error Visit(S32, S32, S32 indices, S32 now_, int64_t in_flight, ffi::Result<S32> tree,
                        ffi::Result<S32> visited_at) {
  const int64_t num_leaves = visited_at->element_count();
  REQUIRE_TREE(*tree, num_leaves);
  REQUIRE(now_.element_count() == 1);
  const int32_t now = *now_.typed_data();
  std::vector<int32_t> leaves, deadlines;
  leaves.reserve(indices.element_count());
  deadlines.reserve(indices.element_count());
  for (size_t i = 0; i < indices.element_count(); ++i) {
    const int32_t index = indices.typed_data()[i];
    if (index < 0 || index >= num_leaves) continue;
    visited_at->typed_data()[index] = Later(now, i);
    leaves.push_back(index);
    deadlines.push_back(Later(now, i + in_flight));
  }
  WriteMinima(tree->typed_data(), num_leaves, leaves, deadlines, now);
  return ffi::Error::Success();
}

static ffi::Error WriteDeadlines(S32, S32 visited_at, S32 indices, S32 strides, S32 now_, int64_t in_flight,
                                 bool arrived, ffi::Result<S32> tree) {
  const int64_t num_leaves = visited_at.element_count();
  REQUIRE_TREE(*tree, num_leaves);
  REQUIRE(now_.element_count() == 1 && strides.element_count() == indices.element_count());
  const size_t count = indices.element_count();
  std::vector<int32_t> leaves, deadlines;
  leaves.reserve(indices.element_count());
  deadlines.reserve(indices.element_count());
  for (size_t i = 0; i < count; ++i) {
    const int64_t ahead = std::clamp<int64_t>(indices.typed_data()[std::min(i + kAhead, count - 1)], 0, num_leaves - 1);
    __builtin_prefetch(tree->typed_data() + ahead, 1);
    __builtin_prefetch(visited_at.typed_data() + ahead);
    const int32_t index = indices.typed_data()[i];
    if (index < 0 || index >= num_leaves) continue;
    const int32_t visited = visited_at.typed_data()[index];
    const int32_t old = Distance(tree->typed_data()[index], visited);
    const bool is_flying = static_cast<uint32_t>(old) >= in_flight;
    int32_t stride = strides.typed_data()[i];
    if (stride <= 0 || (is_flying && !arrived)) stride = is_flying && arrived ? num_leaves : old;
    leaves.push_back(index);
    deadlines.push_back(Later(visited, stride));
  }
  WriteMinima(tree->typed_data(), num_leaves, leaves, deadlines, *now_.typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    read_scores, ReadScores,
    ffi::Ffi::Bind().Arg<F32>().Arg<S32>().Arg<S32>().Ret<F32>().Ret<S32>());

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
    ffi::Ffi::Bind()
        .Arg<F32>()
        .Arg<S32>()
        .Arg<F32>()
        .Arg<Bool>()
        .Attr<int64_t>("num_leaves")
        .Ret<F32>()
        .Ret<S32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    draw_uniform, DrawUniform,
    ffi::Ffi::Bind().Arg<U32>().Attr<int64_t>("num_examples").Attr<bool>("in_parts").Ret<S32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(draw_leaves, DrawLeaves,
                              ffi::Ffi::Bind()
                                  .Arg<U32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Attr<int64_t>("num_leaves")
                                  .Attr<bool>("equally_spaced")
                                  .Ret<S32>()
                                  .Ret<F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    draw_earliest, DrawEarliest,
    ffi::Ffi::Bind().Arg<S32>().Arg<S32>().Arg<S32>().Arg<U32>().Ret<S32>().Ret<S32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(visit, Visit,
                              ffi::Ffi::Bind()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Attr<int64_t>("in_flight")
                                  .Ret<S32>()
                                  .Ret<S32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(write_deadlines, WriteDeadlines,
                              ffi::Ffi::Bind()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Attr<int64_t>("in_flight")
                                  .Attr<bool>("arrived")
                                  .Ret<S32>());
