// Squared norm of the gradient of a convolution's kernel, of each example of a batch, called by XLA:
//
//   Σ_oij (Σ_t image[window t, offset o, channel i] · right[t, j])²
//
// A block of the gradient is summed in registers over all windows t, squared, and forgotten: neither the windows nor the
// gradient are written to memory. `gradnorm/windows.py` has the same in plain JAX.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;

#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif
#define INLINE inline __attribute__((always_inline))

#define REQUIRE(condition) \
  if (!(condition)) return ffi::Error::InvalidArgument("the kernel of convolutions needs " #condition)

// Sixteen numbers; the compiler makes of them what the machine has.
using Lanes = float __attribute__((vector_size(64), aligned(4)));
constexpr int64_t kLanes = 16;

// Geometry of the windows; y before x. `low` is the padding before the image, < 0 where it is cut.
struct Windows {
  int64_t kernel[2], steps[2], kernel_stride[2], step_stride[2], low[2];
};

// One example: the padded image [height, width, channels], and right [windows, columns], whose columns are whole Lanes.
struct Example {
  const float* image;
  const float* right;
  int64_t width, channels, columns;
};

// Returns the squares of `rows` rows of the gradient, beginning at image + start, and of columns [first, first + J).
template <int kRows, int kVectors>
INLINE float BlockSquares(const Example& example, const Windows& windows, int64_t start, int64_t first) {
  Lanes sums[kRows][kVectors] = {};
  const int64_t step = windows.step_stride[1] * example.channels;
  for (int64_t y = 0; y < windows.steps[0]; ++y) {
    const float* left = example.image + start + y * windows.step_stride[0] * example.width * example.channels;
    const float* right = example.right + y * windows.steps[1] * example.columns + first;
    for (int64_t x = 0; x < windows.steps[1]; ++x, left += step, right += example.columns) {
      Lanes columns[kVectors];
      for (int j = 0; j < kVectors; ++j) columns[j] = *reinterpret_cast<const Lanes*>(right + kLanes * j);
      for (int i = 0; i < kRows; ++i) {
        const Lanes row = left[i] - Lanes{};
        for (int j = 0; j < kVectors; ++j) sums[i][j] += row * columns[j];
      }
    }
  }
  Lanes squares = {};
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) squares += sums[i][j] * sums[i][j];
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += squares[lane];
  return total;
}

// The same for a number of rows that is known at run time, at most kRows.
template <int kRows, int kVectors>
INLINE float RowsSquares(int64_t rows, const Example& example, const Windows& windows, int64_t start, int64_t first) {
  if constexpr (kRows > 1)
    if (rows < kRows) return RowsSquares<kRows - 1, kVectors>(rows, example, windows, start, first);
  return BlockSquares<kRows, kVectors>(example, windows, start, first);
}

// Returns the squared norm of one example, in blocks of at most kRows rows and kVectors times Lanes columns.
template <int kRows, int kVectors>
INLINE float Squares(const Example& example, const Windows& windows) {
  // Offsets beside each other, with their channels, are beside each other in the image.
  const bool joined = windows.kernel_stride[1] == 1;
  const int64_t segments = joined ? 1 : windows.kernel[1];
  const int64_t length = joined ? windows.kernel[1] * example.channels : example.channels;
  float total = 0;
  for (int64_t y = 0; y < windows.kernel[0]; ++y)
    for (int64_t segment = 0; segment < segments; ++segment)
      for (int64_t row = 0; row < length; row += kRows) {
        const int64_t place = y * windows.kernel_stride[0] * example.width + segment * windows.kernel_stride[1];
        const int64_t start = place * example.channels + row, rows = std::min<int64_t>(kRows, length - row);
        int64_t first = 0;
        for (; first + kVectors * kLanes <= example.columns; first += kVectors * kLanes)
          total += RowsSquares<kRows, kVectors>(rows, example, windows, start, first);
        for (; first < example.columns; first += kLanes)
          total += RowsSquares<kRows, 1>(rows, example, windows, start, first);
      }
  return total;
}

// Block sizes that the registers hold.
#ifdef __x86_64__
__attribute__((target("avx512f"))) static float Squares512(const Example& e, const Windows& w) { return Squares<8, 2>(e, w); }
__attribute__((target("avx2,fma"))) static float Squares256(const Example& e, const Windows& w) { return Squares<6, 1>(e, w); }
static float SquaresAny(const Example& e, const Windows& w) { return Squares<2, 1>(e, w); }
#else
static float SquaresAny(const Example& e, const Windows& w) { return Squares<5, 1>(e, w); }
#endif

static float (*const kSquares)(const Example&, const Windows&) = [] {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) return Squares512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Squares256;
#endif
  return SquaresAny;
}();

// Work on examples that any number of threads share; none waits for one that has not begun.
struct Work {
  const float *image, *right;
  float* squares;
  int64_t batch, height, width, channels, columns;
  Windows windows;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable changed;
  int64_t done = 0;

  int64_t Padded(int axis) const {
    return (windows.steps[axis] - 1) * windows.step_stride[axis] + (windows.kernel[axis] - 1) * windows.kernel_stride[axis] + 1;
  }

  void Run() {
    std::vector<float> padded, wide;
    for (int64_t b; (b = next.fetch_add(1)) < batch;) {
      squares[b] = Of(b, padded, wide);
      const std::lock_guard<std::mutex> lock(mutex);
      if (++done == batch) changed.notify_all();
    }
  }

  float Of(int64_t b, std::vector<float>& padded, std::vector<float>& wide) const {
    const int64_t rows = Padded(0), places = Padded(1), num_windows = windows.steps[0] * windows.steps[1];
    padded.assign(rows * places * channels, 0.0f);
    const int64_t from = std::max<int64_t>(windows.low[1], 0), until = std::min(places, width + windows.low[1]);
    for (int64_t y = 0; y < rows; ++y) {
      const int64_t source = y - windows.low[0];
      if (source < 0 || source >= height || from >= until) continue;
      std::memcpy(&padded[(y * places + from) * channels],
                  image + ((b * height + source) * width + from - windows.low[1]) * channels,
                  sizeof(float) * (until - from) * channels);
    }
    const int64_t whole = (columns + kLanes - 1) / kLanes * kLanes;
    const float* own = right + b * num_windows * columns;
    if (whole != columns) {
      wide.assign(num_windows * whole, 0.0f);
      for (int64_t t = 0; t < num_windows; ++t) std::memcpy(&wide[t * whole], own + t * columns, sizeof(float) * columns);
      own = wide.data();
    }
    return kSquares({padded.data(), own, places, channels, whole}, windows);
  }
};

static ffi::Error ConvolutionSquares(ffi::ThreadPool pool, F32 image, F32 right, ffi::Span<const int64_t> geometry,
                                     ffi::Result<F32> squares) {
  REQUIRE(image.dimensions().size() == 4 && right.dimensions().size() == 3 && geometry.size() == 10);
  auto work = std::make_shared<Work>();
  work->image = image.typed_data(), work->right = right.typed_data(), work->squares = squares->typed_data();
  work->batch = image.dimensions()[0], work->height = image.dimensions()[1], work->width = image.dimensions()[2];
  work->channels = image.dimensions()[3], work->columns = right.dimensions()[2];
  constexpr int64_t kMost = 1 << 24;
  for (int axis = 0; axis < 2; ++axis) {
    Windows& w = work->windows;
    w.kernel[axis] = geometry[axis], w.steps[axis] = geometry[2 + axis], w.kernel_stride[axis] = geometry[4 + axis];
    w.step_stride[axis] = geometry[6 + axis], w.low[axis] = geometry[8 + axis];
    REQUIRE(w.kernel[axis] >= 1 && w.steps[axis] >= 1 && w.kernel_stride[axis] >= 1 && w.step_stride[axis] >= 1);
    REQUIRE(w.kernel[axis] < kMost && w.steps[axis] < kMost && w.kernel_stride[axis] < kMost);
    REQUIRE(w.step_stride[axis] < kMost && w.low[axis] < kMost && w.low[axis] > -kMost);
    REQUIRE(work->Padded(axis) < kMost);
  }
  REQUIRE(work->channels >= 1 && work->columns >= 1 && work->height >= 1 && work->width >= 1);
  REQUIRE(right.dimensions()[0] == work->batch && squares->element_count() == static_cast<size_t>(work->batch));
  REQUIRE(right.dimensions()[1] == work->windows.steps[0] * work->windows.steps[1]);
  for (int64_t helper = 1; helper < std::min(pool.num_threads(), work->batch); ++helper)
    pool.Schedule([work] { work->Run(); });
  work->Run();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->changed.wait(lock, [&] { return work->done == work->batch; });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_squares, ConvolutionSquares,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Ret<F32>());
