// The door for ONNX Runtime: operators of the domain "slimformer", found by register_custom_ops_library.
//
//   Linear(x, packed, residual?, gain?, shift?) -> y
//     x: float (..., inputs), each row quantized by its own extremes; packed: a constant uint8 vector, see packed.cc; residual: float,
//     as y, added after the activation; gain and shift: float (outputs), a LayerNorm at the end. Attributes: activation (int, 0 none,
//     1 relu, 2 gelu, 3 gelu by tanh), epsilon (float).
//
//   Encoder(ids, packed, mask?, types?) -> hidden
//     ids, mask, types: int64 (rows, columns); packed: a constant uint8 vector, see encoder_file.cc. hidden: float (rows, columns,
//     hidden size), 0 where the mask is, or (rows, hidden size) if the file says that only first columns are wanted.
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "ort_abi.h"
#include "status.h"

namespace {

using ort::Table;

constexpr size_t MOST_DIMENSIONS = 8;

struct Tensor {
  void* data = nullptr;
  int64_t sizes[MOST_DIMENSIONS] = {};
  size_t rank = 0;
  int64_t count = 1;

  int64_t last() const { return rank ? sizes[rank - 1] : 1; }
};

ort::Status* refuse(const Table& api, const char* message) { return api.CreateStatus(ort::INVALID_ARGUMENT, message); }

// An absent tensor has no data and no error.
ort::Status* read_value(const Table& api, const ort::Value* value, Tensor* tensor) {
  *tensor = {};
  if (!value) return nullptr;
  ort::ShapeInfo* info = nullptr;
  if (auto* status = api.GetTensorTypeAndShape(value, &info)) return status;
  ort::Status* status = api.GetDimensionsCount(info, &tensor->rank);
  if (!status && tensor->rank > MOST_DIMENSIONS) status = refuse(api, "slimformer: a tensor has too many dimensions");
  if (!status) status = api.GetDimensions(info, tensor->sizes, tensor->rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (status) return status;
  for (size_t i = 0; i < tensor->rank; i++) tensor->count *= tensor->sizes[i];
  return api.GetTensorMutableData(value, &tensor->data);  // reads too
}

ort::Status* input(const Table& api, ort::KernelContext* context, size_t index, Tensor* tensor) {
  size_t count = 0;
  if (auto* status = api.KernelContext_GetInputCount(context, &count)) return status;
  const ort::Value* value = nullptr;
  if (index < count)
    if (auto* status = api.KernelContext_GetInput(context, index, &value)) return status;
  return read_value(api, value, tensor);
}

ort::Status* constant(const Table& api, const ort::KernelInfo* info, size_t index, Tensor* tensor) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  if (auto* status = api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value)) return status;
  if (!is_constant || !value) return refuse(api, "slimformer: the packed weights must be a constant of the model");
  return read_value(api, value, tensor);
}

template <class T, class Get>
T attribute(const Table& api, Get get, T missing) {
  T value = missing;
  if (auto* status = get(&value)) {
    api.ReleaseStatus(status);
    return missing;
  }
  return value;
}

struct Pool {
  const Table* api;
  ort::KernelContext* context;
};

void on_pool(void* pool, void (*task)(void*, size_t), size_t count, void* user) {
  const Pool& p = *static_cast<Pool*>(pool);
  ort::Status* status = p.api->KernelContext_ParallelFor(p.context, task, count, 0, user);
  if (!status) return;
  p.api->ReleaseStatus(status);
  for (size_t i = 0; i < count; i++) task(user, i);
}

// ONNX Runtime does not tell how many threads its pool has; this only says how finely to split small products.
int likely_threads() {
  static const int count = static_cast<int>(std::thread::hardware_concurrency());
  return count < 1 ? 1 : count > 16 ? 16 : count;
}

struct Linear {
  Table api;
  sfk_linear* linear = nullptr;
  int activation = 0;
  float epsilon = 0.0f;
};

ort::Status* create_linear(const ort::CustomOp*, const ort::Api* table, const ort::KernelInfo* info, void** kernel) {
  const Table api(table);
  Tensor packed;
  if (auto* status = constant(api, info, 1, &packed)) return status;
  auto* made = new (std::nothrow) Linear;
  if (!made) return api.CreateStatus(ort::FAIL, "slimformer: no memory");
  made->api = api;
  made->activation = static_cast<int>(attribute<int64_t>(
      api, [&](int64_t* out) { return api.KernelInfoGetAttribute_int64(info, "activation", out); }, 0));
  made->epsilon = attribute<float>(
      api, [&](float* out) { return api.KernelInfoGetAttribute_float(info, "epsilon", out); }, 1e-12f);
  if (sfk_open(packed.data, static_cast<size_t>(packed.count), &made->linear) != SFK_OK) {
    delete made;
    return refuse(api, sfk_message());
  }
  *kernel = made;
  return nullptr;
}

ort::Status* compute_linear(void* kernel, ort::KernelContext* context) {
  const Linear& k = *static_cast<Linear*>(kernel);
  const Table& api = k.api;
  Tensor x, residual, gain, shift, y;
  if (auto* status = input(api, context, 0, &x)) return status;
  if (auto* status = input(api, context, 2, &residual)) return status;
  if (auto* status = input(api, context, 3, &gain)) return status;
  if (auto* status = input(api, context, 4, &shift)) return status;
  const int64_t outputs = sfk_outputs(k.linear);
  if (!x.rank || x.last() != sfk_inputs(k.linear)) return refuse(api, "slimformer.Linear: the last dimension of x is not the matrix's");
  sfk_product p{};
  p.rows = x.count / x.last();
  std::memcpy(y.sizes, x.sizes, sizeof y.sizes);
  y.sizes[x.rank - 1] = outputs;
  if (residual.data && residual.count != p.rows * outputs) return refuse(api, "slimformer.Linear: the residual has another shape than y");
  if ((gain.data && gain.count != outputs) || (shift.data && shift.count != outputs))
    return refuse(api, "slimformer.Linear: gain and shift need a value for each output");
  ort::Value* value = nullptr;
  if (auto* status = api.KernelContext_GetOutput(context, 0, y.sizes, x.rank, &value)) return status;
  if (auto* status = api.GetTensorMutableData(value, &y.data)) return status;
  if (p.rows == 0) return nullptr;
  Pool pool{&api, context};
  p.x = static_cast<const float*>(x.data), p.y = static_cast<float*>(y.data);
  p.residual = static_cast<const float*>(residual.data);
  p.norm_gain = static_cast<const float*>(gain.data), p.norm_shift = static_cast<const float*>(shift.data);
  p.norm_epsilon = k.epsilon, p.activation = k.activation;
  p.parallel = on_pool, p.pool = &pool, p.threads = likely_threads();
  return sfk_multiply(k.linear, &p) == SFK_OK ? nullptr : refuse(api, sfk_message());
}

void destroy_linear(void* kernel) {
  auto* linear = static_cast<Linear*>(kernel);
  if (linear) sfk_close(linear->linear);
  delete linear;
}

struct Encoder {
  Table api;
  sfk_encoder* encoder = nullptr;
};

ort::Status* create_encoder(const ort::CustomOp*, const ort::Api* table, const ort::KernelInfo* info, void** kernel) {
  const Table api(table);
  Tensor packed;
  if (auto* status = constant(api, info, 1, &packed)) return status;
  auto* made = new (std::nothrow) Encoder;
  if (!made) return api.CreateStatus(ort::FAIL, "slimformer: no memory");
  made->api = api;
  if (sfk_encoder_open(packed.data, static_cast<size_t>(packed.count), &made->encoder) != SFK_OK) {
    delete made;
    return refuse(api, sfk_message());
  }
  *kernel = made;
  return nullptr;
}

ort::Status* compute_encoder(void* kernel, ort::KernelContext* context) {
  const Encoder& k = *static_cast<Encoder*>(kernel);
  const Table& api = k.api;
  Tensor ids, mask, types, hidden;
  if (auto* status = input(api, context, 0, &ids)) return status;
  if (auto* status = input(api, context, 2, &mask)) return status;
  if (auto* status = input(api, context, 3, &types)) return status;
  const auto agrees = [&](const Tensor& other) {
    return !other.data || (other.rank == 2 && other.sizes[0] == ids.sizes[0] && other.sizes[1] == ids.sizes[1]);
  };
  if (ids.rank != 2 || !agrees(mask) || !agrees(types))
    return refuse(api, "slimformer.Encoder: ids, mask and types must have one shape, (rows, columns)");
  const bool first_only = sfk_encoder_first_only(k.encoder);
  const int64_t whole[] = {ids.sizes[0], ids.sizes[1], sfk_encoder_hidden(k.encoder)}, first[] = {whole[0], whole[2]};
  ort::Value* value = nullptr;
  if (auto* status = api.KernelContext_GetOutput(context, 0, first_only ? first : whole, first_only ? 2 : 3, &value)) return status;
  if (auto* status = api.GetTensorMutableData(value, &hidden.data)) return status;
  if (ids.count == 0) return nullptr;
  Pool pool{&api, context};
  sfk_texts texts{};
  texts.rows = ids.sizes[0], texts.columns = ids.sizes[1];
  texts.ids = static_cast<const int64_t*>(ids.data), texts.mask = static_cast<const int64_t*>(mask.data);
  texts.types = static_cast<const int64_t*>(types.data), texts.hidden = static_cast<float*>(hidden.data);
  texts.parallel = on_pool, texts.pool = &pool, texts.threads = likely_threads();
  return sfk_encoder_run(k.encoder, &texts) == SFK_OK ? nullptr : refuse(api, sfk_message());
}

void destroy_encoder(void* kernel) {
  auto* encoder = static_cast<Encoder*>(kernel);
  if (encoder) sfk_encoder_close(encoder->encoder);
  delete encoder;
}

const char* on_cpu(const ort::CustomOp*) { return nullptr; }
size_t one(const ort::CustomOp*) { return 1; }
int first_version(const ort::CustomOp*) { return 1; }
int last_version(const ort::CustomOp*) { return INT32_MAX; }
int any_memory(const ort::CustomOp*, size_t) { return 0; }
int at_least_one(const ort::CustomOp*) { return 1; }
ort::ElementType gives_float(const ort::CustomOp*, size_t) { return ort::FLOAT; }
ort::Characteristic required(const ort::CustomOp*, size_t) { return ort::REQUIRED; }

ort::CustomOp operator_with(const char* (*name)(const ort::CustomOp*), size_t (*inputs)(const ort::CustomOp*),
                            ort::ElementType (*type)(const ort::CustomOp*, size_t),
                            ort::Characteristic (*characteristic)(const ort::CustomOp*, size_t)) {
  ort::CustomOp op{};
  op.version = ort::VERSION;
  op.GetName = name, op.GetExecutionProviderType = on_cpu;
  op.GetInputType = type, op.GetInputTypeCount = inputs, op.GetInputCharacteristic = characteristic;
  op.GetOutputType = gives_float, op.GetOutputTypeCount = one, op.GetOutputCharacteristic = required;
  op.GetInputMemoryType = any_memory;
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = at_least_one;
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = at_least_one;
  op.GetStartVersion = first_version, op.GetEndVersion = last_version;
  return op;
}

ort::CustomOp linear_operator() {
  ort::CustomOp op = operator_with(
      [](const ort::CustomOp*) { return "Linear"; }, [](const ort::CustomOp*) -> size_t { return 5; },
      [](const ort::CustomOp*, size_t index) { return index == 1 ? ort::UINT8 : ort::FLOAT; },
      [](const ort::CustomOp*, size_t index) { return index < 2 ? ort::REQUIRED : ort::OPTIONAL; });
  op.CreateKernelV2 = create_linear, op.KernelComputeV2 = compute_linear, op.KernelDestroy = destroy_linear;
  return op;
}

ort::CustomOp encoder_operator() {
  ort::CustomOp op = operator_with(
      [](const ort::CustomOp*) { return "Encoder"; }, [](const ort::CustomOp*) -> size_t { return 4; },
      [](const ort::CustomOp*, size_t index) { return index == 1 ? ort::UINT8 : ort::INT64; },
      [](const ort::CustomOp*, size_t index) { return index < 2 ? ort::REQUIRED : ort::OPTIONAL; });
  op.CreateKernelV2 = create_encoder, op.KernelComputeV2 = compute_encoder, op.KernelDestroy = destroy_encoder;
  return op;
}

// Session options hold domains by address, so they live as long as the process; a process may hold two copies of ONNX Runtime, and
// each makes its own.
struct Registered {
  const ort::Api* api;
  ort::Domain* domain;
};

}  // namespace

extern "C" SFK_API ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  static const ort::CustomOp linear = linear_operator(), encoder = encoder_operator();
  static std::mutex mutex;
  static auto* known = new std::vector<Registered>;
  const ort::Api* table = base->GetApi(ort::VERSION);
  if (!table) {  // older than 1.17: its own table still has a place for errors
    const ort::Api* oldest = base->GetApi(1);
    return oldest ? Table(oldest).CreateStatus(ort::FAIL, "slimformer-kernels needs ONNX Runtime 1.17 or newer") : nullptr;
  }
  const Table api(table);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Registered& item : *known)
    if (item.api == table) return api.AddCustomOpDomain(options, item.domain);
  ort::Domain* domain = nullptr;
  if (auto* status = api.CreateCustomOpDomain("slimformer", &domain)) return status;
  if (auto* status = api.CustomOpDomain_Add(domain, &linear)) return status;
  if (auto* status = api.CustomOpDomain_Add(domain, &encoder)) return status;
  known->push_back({table, domain});
  return api.AddCustomOpDomain(options, domain);
}
