#include "sparsek.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

namespace sparsek {
namespace {

enum class Kind { kItems, kSelect, kLists, kPrefill };

struct Kernel {
  Kind kind;
  int arch;  // 90 is compute capability 9.0
  // of prefill alone
  Dtype dtype;
  int head_dim;
  int group;  // query heads of a KV head
  int block;    // items of a program; places of a list; rows of a prefill tile
  bool pages;   // of all but items
  bool soft_v;  // of select and prefill
  const char* name;
  const unsigned char* cubin;
  unsigned threads;
  unsigned shared_bytes;
};

// Members are named as the kernels' parameters: sparsek_kernels.h lists them in order.
struct ItemsArguments {
  CUdeviceptr item_row_ptr, item_position_ptr, item_query_start_ptr, item_query_len_ptr;
  int32_t queries, keys, refresh, blocks, items;
};

struct SelectArguments {
  CUdeviceptr scores_ptr, block_table_ptr, item_row_ptr, item_position_ptr, units_ptr, gates_ptr;
  // of selections kept from step to step, begun for several items at once or sifted: not used here
  CUdeviceptr stamps_ptr, step_ptr, base_ptr, base_bounds_ptr, item_base_ptr, room_ptr;
  int32_t first_unit, window, refresh, k;
  int64_t share_bits;
  int32_t max_units;
  int64_t stride_score_block, stride_score_head, stride_table_row, stride_out_item,
      stride_out_head;
};

struct ListsArguments {
  CUdeviceptr block_table_ptr, item_row_ptr, item_position_ptr, item_query_len_ptr, units_ptr,
      slots_ptr;
  int32_t first_unit, window, refresh, k;
  int64_t share_bits;
  int32_t max_units, width;
  int64_t per_block, stride_table_row, stride_units_item, stride_units_head;
};

struct PrefillArguments {
  CUdeviceptr q_ptr, k_ptr, v_ptr, slots_ptr, item_row_ptr, item_position_ptr,
      item_query_start_ptr, item_query_len_ptr, units_ptr, gates_ptr, out_ptr;
  // of an FP8 cache: not used here
  CUdeviceptr k_scale_ptr, v_scale_ptr;
  float scale_log2;
  int32_t first_unit, window, refresh, k;
  int64_t share_bits;
  int32_t max_units, width;
  int64_t stride_q_row, stride_q_token, stride_q_head, stride_k_head, stride_k_token,
      stride_v_head, stride_v_token, stride_units_item, stride_units_head, stride_out_row,
      stride_out_token, stride_out_head;
};

#include "sparsek_kernels.h"

constexpr int kAlignment = 16;  // of pointers in bytes and of strides in elements
constexpr int kMaxGridY = 65535;
constexpr unsigned kDefaultShared = 48 * 1024;  // what a kernel may use without asking
constexpr double kLog2E = 1.4426950408889634;

thread_local char error_text[512] = "";

CUresult fail(CUresult code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_text, sizeof(error_text), format, arguments);
  va_end(arguments);
  return code;
}

template <typename... Values>
CUresult refuse(const char* format, Values... values) {
  return fail(CUDA_ERROR_INVALID_VALUE, format, values...);
}

CUresult driver(CUresult code, const char* call) {
  if (code == CUDA_SUCCESS) return code;
  const char* text = nullptr;
  cuGetErrorString(code, &text);
  return fail(code, "%s: %s", call, text == nullptr ? "unknown error" : text);
}

#define SPARSEK_TRY(expression)                                  \
  do {                                                           \
    const CUresult status_ = (expression);                       \
    if (status_ != CUDA_SUCCESS) return status_;                 \
  } while (0)

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What follows from the params on the host: the same rules as Budget in kernels/common/budget.py,
// and as list_slots in kernels/prefill/triton.py.
struct Plan {
  int64_t blocks;      // refresh blocks that the queries of a row touch
  int64_t items;       // batch * blocks
  int64_t max_units;   // most units that any selection keeps
  int64_t unit_count;  // the same, rounded up for alignment
  int64_t item_slots;  // items, rounded up
  int64_t width;       // places of a list
  int32_t first_unit;
  int64_t units_bytes;
  int64_t gates_bytes;
  int64_t bytes;
};

CUresult make_plan(const AttentionParams& p, Plan* plan) {
  const std::pair<const char*, int32_t> sizes[] = {
      {"batch", p.batch}, {"query_heads", p.query_heads}, {"kv_heads", p.kv_heads},
      {"queries", p.queries}, {"keys", p.keys}, {"head_dim", p.head_dim},
      {"k_tokens", p.k_tokens}, {"window", p.window}, {"refresh", p.refresh}};
  for (const auto& [name, value] : sizes)
    if (value < 1) return refuse("%s is %d: it must be at least 1", name, value);
  if (p.sinks < 0) return refuse("sinks is %d: it must be at least 0", p.sinks);
  if (!(p.k_share >= 0.0 && p.k_share < 1.0))
    return refuse("k_share is %g: it must be a share below 1, or 0", p.k_share);
  if (p.query_heads % p.kv_heads != 0)
    return refuse("query_heads is %d: not a multiple of kv_heads, %d", p.query_heads, p.kv_heads);
  if (p.queries > p.keys)
    return refuse("queries is %d: more than keys, %d", p.queries, p.keys);
  if (p.kv_heads > kMaxGridY)
    return refuse("kv_heads is %d: a grid holds %d", p.kv_heads, kMaxGridY);
  const int64_t unit = p.pages ? kPage : 1;
  const int64_t first = p.keys - p.queries;
  plan->blocks = (p.keys - 1) / p.refresh - first / p.refresh + 1;
  plan->items = plan->blocks * p.batch;
  if (plan->items > INT32_MAX)
    return refuse("batch is %d: %lld selections are more than a grid holds", p.batch,
                  static_cast<long long>(plan->items));
  const int64_t start = int64_t{p.keys - 1} / p.refresh * p.refresh;
  int64_t tokens = p.k_tokens;
  if (p.k_share > 0.0)
    tokens = std::max(tokens, static_cast<int64_t>(std::ceil(p.k_share * double(start + 1))));
  plan->first_unit = static_cast<int32_t>((p.sinks + unit - 1) / unit);
  // division rounds towards zero: a negative number is below first_unit either way
  const int64_t end = std::max<int64_t>(plan->first_unit, (start - p.window + 1) / unit);
  const int64_t competing = end - plan->first_unit;
  plan->max_units = std::max<int64_t>(1, std::min((tokens + unit - 1) / unit, competing));
  plan->unit_count = round_up(plan->max_units, kAlignment);
  plan->item_slots = round_up(plan->items, kAlignment);
  const int64_t longest =
      (plan->first_unit + plan->max_units + 1) * unit + int64_t{p.window} + p.refresh;
  plan->width = round_up(longest, kListMultiple);
  if (plan->width > INT32_MAX)
    return refuse("window is %d, refresh %d, keys %d: a list of %lld tokens is too long", p.window,
                  p.refresh, p.keys, static_cast<long long>(plan->width));
  const int64_t lists = plan->items * p.kv_heads;
  plan->units_bytes = lists * plan->unit_count * int64_t{sizeof(int32_t)};
  plan->gates_bytes = p.soft_v ? plan->units_bytes : 0;
  plan->bytes = 4 * plan->item_slots * int64_t{sizeof(int32_t)} + plan->units_bytes +
                plan->gates_bytes + lists * plan->width * int64_t{sizeof(int32_t)};
  return CUDA_SUCCESS;
}

CUresult check_memory(const AttentionParams& p, const Plan& plan) {
  const std::pair<const char*, const void*> pointers[] = {{"q", p.q}, {"k", p.k}, {"v", p.v},
      {"scores", p.scores}, {"out", p.out}, {"workspace", p.workspace}};
  for (const auto& [name, pointer] : pointers) {
    if (pointer == nullptr) return refuse("%s is null", name);
    if (reinterpret_cast<uintptr_t>(pointer) % kAlignment != 0)
      return refuse("%s is not aligned to %d bytes", name, kAlignment);
  }
  const std::pair<const char*, const int64_t*> strides[] = {{"q_strides", p.q_strides},
      {"k_strides", p.k_strides}, {"v_strides", p.v_strides}, {"out_strides", p.out_strides}};
  for (const auto& [name, values] : strides)
    for (int i = 0; i < 3; ++i)
      if (values[i] % kAlignment != 0)
        return refuse("%s[%d] is %lld: it must be a multiple of %d elements", name, i,
                      static_cast<long long>(values[i]), kAlignment);
  if (p.workspace_bytes < static_cast<size_t>(plan.bytes))
    return refuse("workspace_bytes is %zu: workspace_size() says %lld", p.workspace_bytes,
                  static_cast<long long>(plan.bytes));
  return CUDA_SUCCESS;
}

// Tokens from one row of k and v to the next.
CUresult tokens_between_rows(const AttentionParams& p, int64_t* between) {
  const std::pair<const char*, const int64_t*> strides[] = {{"k_strides", p.k_strides},
                                                            {"v_strides", p.v_strides}};
  for (const auto& [name, values] : strides)
    if (values[2] == 0 || values[0] % values[2] != 0)
      return refuse("%s[0] is %lld: it must be a multiple of %s[2], %lld", name,
                    static_cast<long long>(values[0]), name, static_cast<long long>(values[2]));
  *between = p.k_strides[0] / p.k_strides[2];
  const int64_t other = p.v_strides[0] / p.v_strides[2];
  if (*between != other)
    return refuse("k_strides: %lld tokens from row to row, v_strides: %lld; lay k and v out alike",
                  static_cast<long long>(*between), static_cast<long long>(other));
  // the place of a token in its head has 32 bits
  const int64_t most = (INT32_MAX - int64_t{p.keys}) / std::max(1, p.batch - 1);
  if (p.batch > 1 && (*between > most || *between < -most))
    return refuse("k_strides: %lld tokens from row to row; with batch %d and keys %d at most %lld",
                  static_cast<long long>(*between), p.batch, p.keys,
                  static_cast<long long>(most));
  return CUDA_SUCCESS;
}

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16: return "fp16";
    case Dtype::kBFloat16: return "bf16";
    case Dtype::kFloat32: return "fp32";
  }
  return "?";
}

// Binaries run on their own compute capability; before 9.0 also on later ones of the same major.
bool runs_on(const Kernel& kernel, int arch) {
  return kernel.arch == arch || (arch < 90 && kernel.arch / 10 == arch / 10 && kernel.arch < arch);
}

CUresult find(Kind kind, int arch, const AttentionParams& p, const Kernel** found) {
  const int group = p.query_heads / p.kv_heads;
  *found = nullptr;
  std::string exported;
  for (const Kernel& kernel : kKernels) {
    if (kernel.kind != kind) continue;
    bool fits = runs_on(kernel, arch);
    if (kind != Kind::kItems) fits = fits && kernel.pages == p.pages;
    if (kind == Kind::kSelect || kind == Kind::kPrefill) fits = fits && kernel.soft_v == p.soft_v;
    if (kind == Kind::kPrefill)
      fits = fits && kernel.dtype == p.dtype && kernel.head_dim == p.head_dim &&
             kernel.group == group;
    if (fits && (*found == nullptr || kernel.arch > (*found)->arch)) *found = &kernel;
    if (kernel.kind == Kind::kPrefill) {
      char text[96];
      snprintf(text, sizeof(text), "%s sm_%d %s head_dim %d group %d %s%s",
               exported.empty() ? "" : ";", kernel.arch, name_of(kernel.dtype), kernel.head_dim,
               kernel.group, kernel.pages ? "pages" : "tokens", kernel.soft_v ? " soft_v" : "");
      exported += text;
    }
  }
  if (*found != nullptr) return CUDA_SUCCESS;
  return fail(CUDA_ERROR_NO_BINARY_FOR_GPU,
              "no kernel was exported for sm_%d %s head_dim %d group %d %s%s; there are:%s", arch,
              name_of(p.dtype), p.head_dim, group, p.pages ? "pages" : "tokens",
              p.soft_v ? " soft_v" : "", exported.c_str());
}

// The function of a kernel in the current context, loaded once.
CUresult load(const Kernel& kernel, CUcontext context, CUfunction* function) {
  static std::mutex mutex;
  static std::map<std::pair<CUcontext, const Kernel*>, CUfunction> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(context, &kernel);
  const auto entry = loaded.find(key);
  if (entry != loaded.end()) {
    *function = entry->second;
    return CUDA_SUCCESS;
  }
  CUmodule module;
  SPARSEK_TRY(driver(cuModuleLoadData(&module, kernel.cubin), "cuModuleLoadData"));
  SPARSEK_TRY(driver(cuModuleGetFunction(function, module, kernel.name), "cuModuleGetFunction"));
  if (kernel.shared_bytes > kDefaultShared)
    SPARSEK_TRY(driver(
        cuFuncSetAttribute(*function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                           static_cast<int>(kernel.shared_bytes)),
        "cuFuncSetAttribute"));
  loaded.emplace(key, *function);
  return CUDA_SUCCESS;
}

CUresult launch(const Kernel& kernel, CUcontext context, unsigned x, unsigned y, unsigned z,
                void** arguments, CUstream stream) {
  CUfunction function;
  SPARSEK_TRY(load(kernel, context, &function));
  return driver(cuLaunchKernel(function, x, y, z, kernel.threads, 1, 1, kernel.shared_bytes,
                               stream, arguments, nullptr),
                kernel.name);
}

void fill_strides(int64_t (&strides)[3], int64_t heads, int64_t tokens, int64_t head_dim) {
  if (strides[0] != 0 || strides[1] != 0 || strides[2] != 0) return;
  strides[2] = head_dim;
  strides[1] = tokens * strides[2];
  strides[0] = heads * strides[1];
}

// The params with the strides of contiguous tensors where there were none.
AttentionParams with_strides(AttentionParams p) {
  fill_strides(p.q_strides, p.query_heads, p.queries, p.head_dim);
  fill_strides(p.k_strides, p.kv_heads, p.keys, p.head_dim);
  fill_strides(p.v_strides, p.kv_heads, p.keys, p.head_dim);
  fill_strides(p.out_strides, p.query_heads, p.queries, p.head_dim);
  if (p.score_strides[0] == 0 && p.score_strides[1] == 0) {
    p.score_strides[1] = p.keys;
    p.score_strides[0] = int64_t{p.kv_heads} * p.keys;
  }
  return p;
}

CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace

const char* last_error() { return error_text; }

size_t workspace_size(const AttentionParams& params) {
  Plan plan;
  if (make_plan(params, &plan) != CUDA_SUCCESS) return 0;
  return static_cast<size_t>(plan.bytes);
}

CUresult attention_forward(const AttentionParams& params, CUstream stream) {
  const AttentionParams p = with_strides(params);
  Plan plan;
  SPARSEK_TRY(make_plan(p, &plan));
  SPARSEK_TRY(check_memory(p, plan));
  int64_t per_block;
  SPARSEK_TRY(tokens_between_rows(p, &per_block));
  CUcontext context = nullptr;
  SPARSEK_TRY(driver(cuCtxGetCurrent(&context), "cuCtxGetCurrent"));
  if (context == nullptr) return fail(CUDA_ERROR_INVALID_CONTEXT, "no CUDA context is current");
  CUdevice device;
  int major = 0, minor = 0;
  SPARSEK_TRY(driver(cuCtxGetDevice(&device), "cuCtxGetDevice"));
  SPARSEK_TRY(driver(
      cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device),
      "cuDeviceGetAttribute"));
  SPARSEK_TRY(driver(
      cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device),
      "cuDeviceGetAttribute"));
  const int arch = 10 * major + minor;
  const Kernel *items_kernel, *select_kernel, *lists_kernel, *prefill_kernel;
  SPARSEK_TRY(find(Kind::kPrefill, arch, p, &prefill_kernel));
  SPARSEK_TRY(find(Kind::kSelect, arch, p, &select_kernel));
  SPARSEK_TRY(find(Kind::kLists, arch, p, &lists_kernel));
  SPARSEK_TRY(find(Kind::kItems, arch, p, &items_kernel));

  const CUdeviceptr memory = address(p.workspace);
  const CUdeviceptr item_bytes = static_cast<CUdeviceptr>(plan.item_slots) * sizeof(int32_t);
  const CUdeviceptr units = memory + 4 * item_bytes;
  const CUdeviceptr gates = p.soft_v ? units + static_cast<CUdeviceptr>(plan.units_bytes) : units;
  const CUdeviceptr slots =
      units + static_cast<CUdeviceptr>(plan.units_bytes + plan.gates_bytes);
  const int32_t items = static_cast<int32_t>(plan.items);
  int64_t share_bits;
  std::memcpy(&share_bits, &p.k_share, sizeof(share_bits));

  ItemsArguments i{};
  i.item_row_ptr = memory;
  i.item_position_ptr = memory + item_bytes;
  i.item_query_start_ptr = memory + 2 * item_bytes;
  i.item_query_len_ptr = memory + 3 * item_bytes;
  i.queries = p.queries;
  i.keys = p.keys;
  i.refresh = p.refresh;
  i.blocks = static_cast<int32_t>(plan.blocks);
  i.items = items;

  SelectArguments s{};
  s.scores_ptr = address(p.scores);
  // a row is one block: the first item of row r holds its number, r
  s.block_table_ptr = i.item_row_ptr;
  s.stride_table_row = plan.blocks;
  s.item_row_ptr = i.item_row_ptr;
  s.item_position_ptr = i.item_position_ptr;
  s.units_ptr = units;
  s.gates_ptr = gates;
  s.stamps_ptr = units;
  s.step_ptr = i.item_row_ptr;
  s.base_ptr = units;
  s.base_bounds_ptr = i.item_row_ptr;
  s.item_base_ptr = i.item_row_ptr;
  s.room_ptr = units;
  s.first_unit = plan.first_unit;
  s.window = p.window;
  s.refresh = p.refresh;
  s.k = p.k_tokens;
  s.share_bits = share_bits;
  s.max_units = static_cast<int32_t>(plan.max_units);
  s.stride_score_block = p.score_strides[0];
  s.stride_score_head = p.score_strides[1];
  s.stride_out_item = p.kv_heads * plan.unit_count;
  s.stride_out_head = plan.unit_count;

  ListsArguments l{};
  l.block_table_ptr = s.block_table_ptr;
  l.stride_table_row = s.stride_table_row;
  l.item_row_ptr = i.item_row_ptr;
  l.item_position_ptr = i.item_position_ptr;
  l.item_query_len_ptr = i.item_query_len_ptr;
  l.units_ptr = units;
  l.slots_ptr = slots;
  l.first_unit = s.first_unit;
  l.window = s.window;
  l.refresh = s.refresh;
  l.k = s.k;
  l.share_bits = share_bits;
  l.max_units = s.max_units;
  l.width = static_cast<int32_t>(plan.width);
  l.per_block = per_block;
  l.stride_units_item = s.stride_out_item;
  l.stride_units_head = s.stride_out_head;

  PrefillArguments a{};
  a.q_ptr = address(p.q);
  a.k_ptr = address(p.k);
  a.v_ptr = address(p.v);
  a.out_ptr = address(p.out);
  a.slots_ptr = slots;
  a.item_row_ptr = i.item_row_ptr;
  a.item_position_ptr = i.item_position_ptr;
  a.item_query_start_ptr = i.item_query_start_ptr;
  a.item_query_len_ptr = i.item_query_len_ptr;
  a.units_ptr = units;
  a.gates_ptr = gates;
  a.k_scale_ptr = units;
  a.v_scale_ptr = units;
  const double scale = p.scale == 0.0 ? 1.0 / std::sqrt(double(p.head_dim)) : p.scale;
  a.scale_log2 = static_cast<float>(scale * kLog2E);
  a.first_unit = s.first_unit;
  a.window = s.window;
  a.refresh = s.refresh;
  a.k = s.k;
  a.share_bits = share_bits;
  a.max_units = s.max_units;
  a.width = l.width;
  a.stride_q_row = p.q_strides[0];
  a.stride_q_head = p.q_strides[1];
  a.stride_q_token = p.q_strides[2];
  a.stride_k_head = p.k_strides[1];
  a.stride_k_token = p.k_strides[2];
  a.stride_v_head = p.v_strides[1];
  a.stride_v_token = p.v_strides[2];
  a.stride_out_row = p.out_strides[0];
  a.stride_out_head = p.out_strides[1];
  a.stride_out_token = p.out_strides[2];
  a.stride_units_item = s.stride_out_item;
  a.stride_units_head = s.stride_out_head;

  // every kernel ends with pointers to scratch memory, which none of these uses
  CUdeviceptr none = 0;
  void* item_list[] = {SPARSEK_ITEMS_ARGUMENTS(i)};
  void* select_list[] = {SPARSEK_SELECT_ARGUMENTS(s)};
  void* lists_list[] = {SPARSEK_LISTS_ARGUMENTS(l)};
  void* prefill_list[] = {SPARSEK_PREFILL_ARGUMENTS(a)};
  const unsigned heads = static_cast<unsigned>(p.kv_heads);
  const unsigned programs = (plan.items + items_kernel->block - 1) / items_kernel->block;
  const unsigned parts = (plan.width + lists_kernel->block - 1) / lists_kernel->block;
  const int64_t rows =
      int64_t{std::min(p.refresh, p.queries)} * (p.query_heads / p.kv_heads);
  const unsigned tiles = (rows + prefill_kernel->block - 1) / prefill_kernel->block;
  SPARSEK_TRY(launch(*items_kernel, context, programs, 1, 1, item_list, stream));
  SPARSEK_TRY(launch(*select_kernel, context, items, heads, 1, select_list, stream));
  SPARSEK_TRY(launch(*lists_kernel, context, items, heads, parts, lists_list, stream));
  return launch(*prefill_kernel, context, items, heads, tiles, prefill_list, stream);
}

}  // namespace sparsek
