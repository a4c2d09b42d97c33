// SparseK attention over dense tensors: Triton kernels compiled ahead of time, and their launcher.
// Link sparsek.cpp and the CUDA driver (-lcuda). What it computes is what
// vllm_sparsek.attention_forward computes; the words are explained there.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda.h>

namespace sparsek {

enum class Dtype { kFloat16, kBFloat16, kFloat32 };

// tokens of a unit where pages compete
constexpr int kPage = 16;

struct AttentionParams {
  // Device memory, aligned to 16 bytes. The last dimension of a tensor is contiguous.
  const void* q = nullptr;        // [batch, query_heads, queries, head_dim]
  const void* k = nullptr;        // [batch, kv_heads, keys, head_dim]
  const void* v = nullptr;        // [batch, kv_heads, keys, head_dim]
  const float* scores = nullptr;  // [batch, kv_heads, keys], no NaN
  void* out = nullptr;            // [batch, query_heads, queries, head_dim]
  void* workspace = nullptr;      // workspace_size() bytes, contents irrelevant
  size_t workspace_bytes = 0;

  Dtype dtype = Dtype::kFloat16;  // of q, k, v and out
  int32_t batch = 0;
  int32_t query_heads = 0;  // a multiple of kv_heads
  int32_t kv_heads = 0;
  int32_t queries = 0;  // the last positions of the context; at most keys
  int32_t keys = 0;
  int32_t head_dim = 0;

  // Elements from one row of the batch, one head and one token to the next; multiples of 16,
  // except those of scores [row, head]. All 0: the tensor is contiguous. From one row of k to the
  // next it must be a whole number of tokens, as many as from one row of v to the next.
  int64_t q_strides[3] = {0, 0, 0};
  int64_t k_strides[3] = {0, 0, 0};
  int64_t v_strides[3] = {0, 0, 0};
  int64_t out_strides[3] = {0, 0, 0};
  int64_t score_strides[2] = {0, 0};

  double scale = 0.0;  // softmax scale; 0: head_dim ** -0.5

  // What a query reads: see SparseKConfig.
  int32_t k_tokens = 1536;  // tokens kept beside sinks and window; with k_share their least number
  double k_share = 0.0;     // share of the context that is kept, below 1; 0: k_tokens is the number
  int32_t window = 512;
  int32_t sinks = 16;
  int32_t refresh = 64;
  bool pages = false;   // pages of kPage tokens compete, with log-sum-exp scores; else tokens
  bool soft_v = false;  // mode soft_v; else hard
};

// Bytes that params.workspace must have; 0 if the params are refused.
size_t workspace_size(const AttentionParams& params);

// Enqueues the kernels on a stream of the current context. The first call in a context loads the
// kernels: make it before a stream is captured. Later calls only launch.
// Returns CUDA_SUCCESS; CUDA_ERROR_INVALID_VALUE for params that cannot be used,
// CUDA_ERROR_NO_BINARY_FOR_GPU if no exported kernel fits, or what the driver returned.
CUresult attention_forward(const AttentionParams& params, CUstream stream);

// What was wrong with the last call of this thread that failed.
const char* last_error();

}  // namespace sparsek
