// Tiny kernels that do right or wrong on purpose, for the tests of simt.h itself. Each takes one array.
#include "simt.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---- Memory and barriers ----------------------------------------------------------------------------

// Every thread hands its number to the one before it, round the block: once, then twice more.
template <bool First, bool Second>
__global__ void hand_on(int64_t* out) {
  SAEK_SHARED(int, numbers, 1024);
  const int i = threadIdx.x, n = blockDim.x;
  numbers[i] = i;
  for (int round = 0; round < 3; ++round) {
    if (First || round > 0) __syncthreads();
    const int next = numbers[(i + 1) % n];
    if (Second) __syncthreads();
    numbers[i] = next;
  }
  out[blockIdx.x * n + i] = numbers[i];
}

template <bool Barrier>
__global__ void hand_on_in_a_warp(int64_t* out) {
  SAEK_DYNAMIC_SHARED(double, numbers);
  const int i = threadIdx.x;
  numbers[i] = i;
  if (Barrier) __syncwarp();
  out[i] = static_cast<int64_t>(numbers[i ^ 1]);
}

// What is there before anything is written, for each of two blocks.
__global__ void look(int64_t* out) {
  SAEK_SHARED(uint32_t, fixed, 3);
  SAEK_DYNAMIC_SHARED(uint32_t, dynamic);
  for (int i = 0; i < 3; ++i) {
    out[6 * blockIdx.x + i] = fixed[i];
    out[6 * blockIdx.x + 3 + i] = dynamic[i];
    fixed[i] = dynamic[i] = 1;
  }
}

template <int Which>
__device__ int64_t* slot() {
  SAEK_SHARED(int64_t, one, 1);
  return one;
}

__global__ void slots(int64_t* out) {
  *slot<0>() = 10;
  *slot<1>() = 20;
  out[0] = *slot<0>();
  out[1] = *slot<1>();
}

__device__ void write_outside(int* array, int64_t where) { array[where] = 1; }

__global__ void stray(int64_t* out) {
  SAEK_SHARED(int, left, 4);
  SAEK_SHARED(int, right, 4);
  SAEK_DYNAMIC_SHARED(int, dynamic);
  int* const arrays[] = {left, right, dynamic};
  write_outside(arrays[out[0]], out[1]);
}

__global__ void add_up(int64_t* out) {
  atomicAdd(reinterpret_cast<unsigned long long*>(out), 1ull << 40);
  out[1 + threadIdx.x] = atomicAdd(reinterpret_cast<int*>(out + 1 + blockDim.x), 2);
}

__global__ void overflow(int64_t* out) { out[1] = static_cast<int>(out[0]) * static_cast<int>(out[0]); }

// ---- Order ------------------------------------------------------------------------------------------

__global__ void order(int64_t* out) {
  const unsigned b = blockIdx.y * gridDim.x + blockIdx.x;
  out[++out[0]] = b * blockDim.x + threadIdx.x;
}

// ---- Operations of a warp ---------------------------------------------------------------------------

// in: operation, distance, value of lane 0, mask; out: what every thread gets.
template <class T>
__global__ void shuffle(int64_t* out) {
  const int64_t operation = out[0], n = out[1];
  const T value = static_cast<T>(out[2] + threadIdx.x);
  const unsigned mask = static_cast<unsigned>(out[3]);
  const int by = static_cast<int>(n);
  T got;
  if (operation == 0) got = __shfl_sync(mask, value, by * static_cast<int>(threadIdx.x));
  else if (operation == 1) got = __shfl_up_sync(mask, value, by);
  else if (operation == 2) got = __shfl_down_sync(mask, value, by);
  else got = __shfl_xor_sync(mask, value, by);
  out[4 + threadIdx.x] = static_cast<int64_t>(got);
}

// Many in a row: no lane may see a value of the next.
__global__ void prefix_sums(int64_t* out) {
  int64_t sum = 1;
  for (int by = 1; by < 32; by *= 2) {
    const int64_t before = __shfl_up_sync(kAll, sum, by);
    if (static_cast<int>(threadIdx.x % 32) >= by) sum += before;
  }
  out[threadIdx.x] = sum;
}

__global__ void ballot(int64_t* out) {
  const int bit = static_cast<int>(out[0] >> threadIdx.x % 32 & 1);
  out[1 + threadIdx.x] = __ballot_sync(kAll, -4 * bit);
}

__global__ void count_bits(int64_t* out) {
  const int64_t bits = out[0];
  out[1] = __popc(static_cast<unsigned>(bits));
  out[2] = __popcll(static_cast<unsigned long long>(bits));
  out[3] = __ffsll(static_cast<long long>(bits));
}

// ---- Barriers that never open -----------------------------------------------------------------------

__global__ void leave_early(int64_t* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void leave_the_warp_early(int64_t* out) {
  if (threadIdx.x == blockDim.x - 2) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}

__global__ void wait_for_different_things(int64_t* out) {
  if (threadIdx.x == 0) __syncthreads();
  else __syncwarp();
  out[threadIdx.x] = 1;
}

__global__ void shuffle_in_two_places(int64_t* out) {
  if (threadIdx.x % 2 == 0)
    out[threadIdx.x] = __shfl_down_sync(kAll, 1, 1);
  else
    out[threadIdx.x] = __shfl_down_sync(kAll, 2, 1);
}

__global__ void shuffle_in_two_ways(int64_t* out) {
  out[threadIdx.x] = threadIdx.x % 2 == 0 ? __shfl_down_sync(kAll, 1, 1) : __shfl_up_sync(kAll, 2, 1);
}

__global__ void meet_in_two_places(int64_t* out) {
  if (threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

const char* outcome() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

// What went wrong, or NULL.
#define EXAMPLE(name, kernel)                                                                               \
  extern "C" __attribute__((visibility("default"))) const char* name(int64_t* out, unsigned blocks,         \
                                                                     unsigned layers, int threads,          \
                                                                     int64_t shared_bytes) {                \
    SAEK_LAUNCH(kernel, dim3(blocks, layers), threads, shared_bytes, nullptr, out);                         \
    return outcome();                                                                                       \
  }

EXAMPLE(hand_on_right, (hand_on<true, true>))
EXAMPLE(hand_on_without_first, (hand_on<false, true>))
EXAMPLE(hand_on_without_second, (hand_on<true, false>))
EXAMPLE(hand_on_in_warp, hand_on_in_a_warp<true>)
EXAMPLE(hand_on_in_warp_without, hand_on_in_a_warp<false>)
EXAMPLE(look_at_shared, look)
EXAMPLE(shared_of_functions, slots)
EXAMPLE(write_stray, stray)
EXAMPLE(add_atomically, add_up)
EXAMPLE(overflow_int, overflow)
EXAMPLE(note_order, order)
EXAMPLE(shuffle_int, shuffle<int>)
EXAMPLE(shuffle_int64, shuffle<int64_t>)
EXAMPLE(shuffle_float, shuffle<float>)
EXAMPLE(shuffle_double, shuffle<double>)
EXAMPLE(sum_prefixes, prefix_sums)
EXAMPLE(vote, ballot)
EXAMPLE(bits, count_bits)
EXAMPLE(early, leave_early)
EXAMPLE(early_in_warp, leave_the_warp_early)
EXAMPLE(different_things, wait_for_different_things)
EXAMPLE(two_places_in_warp, shuffle_in_two_places)
EXAMPLE(two_ways_in_warp, shuffle_in_two_ways)
EXAMPLE(two_places, meet_in_two_places)

// One kernel fails; of two that are queued before anybody asks, one would do right and one fail otherwise.
extern "C" __attribute__((visibility("default"))) const char* go_on(int64_t* out, unsigned, unsigned, int,
                                                                    int64_t) {
  cudaMemsetAsync(out, 0, 8 * sizeof(int64_t), nullptr);
  SAEK_LAUNCH(leave_early, 1, 8, 0, nullptr, out);
  SAEK_LAUNCH((hand_on<true, true>), 1, 8, 0, nullptr, out);
  SAEK_LAUNCH((hand_on<true, true>), 1, 2000, 0, nullptr, out);
  return outcome();
}
