// Our own declaration of the few parts of ONNX Runtime's C interface that a custom operator touches: the layout of OrtCustomOp up to
// version 17, and places in the function table OrtApi, which only ever grows at its end. Nothing of ONNX Runtime is linked; the
// table comes with the call that registers the operators. Version 17 (ONNX Runtime 1.17) is the first with ParallelFor.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t VERSION = 17;

struct Status;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct Domain;
struct SessionOptions;
struct Api;  // a table of functions

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum ElementType : int { FLOAT = 1, UINT8 = 2, INT64 = 7 };
enum Characteristic : int { REQUIRED = 0, OPTIONAL = 1 };
enum ErrorCode : int { FAIL = 1, INVALID_ARGUMENT = 2 };

struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t index);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  int (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, void* context);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

// The function in one slot of the table.
template <class Function>
Function slot(const Api* api, size_t index) {
  return reinterpret_cast<Function>(reinterpret_cast<void* const*>(api)[index]);
}

// Each method is one slot; the names are ONNX Runtime's.
class Table {
 public:
  explicit Table(const Api* api = nullptr) : api_(api) {}

  Status* CreateStatus(ErrorCode code, const char* message) const {
    return slot<Status* (*)(ErrorCode, const char*)>(api_, 0)(code, message);
  }
  Status* CreateCustomOpDomain(const char* name, Domain** domain) const {
    return slot<Status* (*)(const char*, Domain**)>(api_, 26)(name, domain);
  }
  Status* CustomOpDomain_Add(Domain* domain, const CustomOp* op) const {
    return slot<Status* (*)(Domain*, const CustomOp*)>(api_, 27)(domain, op);
  }
  Status* AddCustomOpDomain(SessionOptions* options, Domain* domain) const {
    return slot<Status* (*)(SessionOptions*, Domain*)>(api_, 28)(options, domain);
  }
  Status* GetTensorMutableData(const Value* value, void** data) const {
    return slot<Status* (*)(const Value*, void**)>(api_, 51)(value, data);
  }
  Status* GetDimensionsCount(const ShapeInfo* info, size_t* count) const {
    return slot<Status* (*)(const ShapeInfo*, size_t*)>(api_, 61)(info, count);
  }
  Status* GetDimensions(const ShapeInfo* info, int64_t* sizes, size_t count) const {
    return slot<Status* (*)(const ShapeInfo*, int64_t*, size_t)>(api_, 62)(info, sizes, count);
  }
  Status* GetTensorTypeAndShape(const Value* value, ShapeInfo** info) const {
    return slot<Status* (*)(const Value*, ShapeInfo**)>(api_, 65)(value, info);
  }
  Status* KernelInfoGetAttribute_float(const KernelInfo* info, const char* name, float* out) const {
    return slot<Status* (*)(const KernelInfo*, const char*, float*)>(api_, 85)(info, name, out);
  }
  Status* KernelInfoGetAttribute_int64(const KernelInfo* info, const char* name, int64_t* out) const {
    return slot<Status* (*)(const KernelInfo*, const char*, int64_t*)>(api_, 86)(info, name, out);
  }
  Status* KernelContext_GetInputCount(const KernelContext* context, size_t* count) const {
    return slot<Status* (*)(const KernelContext*, size_t*)>(api_, 88)(context, count);
  }
  Status* KernelContext_GetInput(const KernelContext* context, size_t index, const Value** value) const {
    return slot<Status* (*)(const KernelContext*, size_t, const Value**)>(api_, 90)(context, index, value);
  }
  Status* KernelContext_GetOutput(KernelContext* context, size_t index, const int64_t* sizes, size_t count, Value** value) const {
    return slot<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(api_, 91)(context, index, sizes, count, value);
  }
  void ReleaseStatus(Status* status) const { slot<void (*)(Status*)>(api_, 93)(status); }
  void ReleaseTensorTypeAndShapeInfo(ShapeInfo* info) const { slot<void (*)(ShapeInfo*)>(api_, 99)(info); }
  Status* KernelInfoGetConstantInput_tensor(const KernelInfo* info, size_t index, int* constant, const Value** value) const {
    return slot<Status* (*)(const KernelInfo*, size_t, int*, const Value**)>(api_, 249)(info, index, constant, value);
  }
  // Runs nothing if `user` is null.
  Status* KernelContext_ParallelFor(const KernelContext* context, void (*task)(void*, size_t), size_t total, size_t batches,
                                    void* user) const {
    return slot<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(api_, 274)(context, task, total,
                                                                                                             batches, user);
  }

 private:
  const Api* api_;
};

}  // namespace ort
