// The calls from Python: plain structs, filled by src/statemix/kernels/library.py. Field order is the contract.
#pragma once
#include <cstddef>
#include <cstdint>

namespace statemix {

constexpr int kInterface = 11;  // counts the changes of these structs and of what the entry points return
constexpr int kMaxOrder = 64;   // largest block size or order served

enum Kind : int32_t { kBlock = 0, kCompanion = 1, kObserver = 2 };
enum Normalization : int32_t { kSoftmax = 0, kSigmoid, kRelu, kTanh, kSilu, kLinear, kNone };
enum Storage : int32_t { kFloat = 0, kDouble, kBfloat16 };  // of raw gates, values and their gradients; bfloat16: all else is float

// A scan. Raw gates are (B, T, rows, M+1, N) with M rows for a block scan and one row otherwise; values (B, T, rows, N).
// Everything below a time step is contiguous; strides are in elements and may be 0. All else is contiguous.
struct ScanCall {
  int64_t batch, length, order, blocks;
  int64_t gate_batch_stride, gate_time_stride, value_batch_stride, value_time_stride;
  int32_t kind, normalization, storage, threads;
  const void* raw_gates;
  const void* values;
  const void* initial_state;  // (B, M, N)
  const uint8_t* reset;       // (B, T) or null
  void* states;               // forward: written; backward: read
  void* final_state;
  const void* grad_states;
  const void* grad_final_state;
  void* grad_raw_gates;
  void* grad_values;
  void* grad_initial_state;
};

// A whole layer: raw gates and values from x, the scan, and the read-out. All tensors are contiguous.
// Where x has few different rows it may be a table of them, (table_rows, D), with `places` (B, T), whose numbers are below that.
// gate_weight (rows (M+1) N, D), gate_bias, value_weight (rows N, D), output_weight (D, M N): the rows and columns as in ScanCall.
// The states and the kept raw gates have a layout of their own, see layer.h.
struct LayerCall {
  int64_t batch, length, width, order, blocks, table_rows;
  int32_t kind, normalization, storage, threads;
  const void *x, *gate_weight, *gate_bias, *value_weight, *output_weight, *initial_state;
  const uint8_t* reset;
  const int64_t* places;   // null: x is (B, T, D)
  const void* visibility;  // (B, N) or null: what the read-out sees of each block is multiplied by it
  void *y, *final_state, *states;
  void* kept;  // raw gates and values of every step; null: the backward computes them again
  const void *grad_y, *grad_final_state;
  void *grad_x, *grad_gate_weight, *grad_gate_bias, *grad_value_weight, *grad_output_weight, *grad_initial_state;
};

// One token through a residual pair: x + mixer(norm(x)), then that + SwiGLU(norm(that)), norm(x) = x weight / rms(x).
// y may be where x is, and the final state where the initial one is.
struct PairCall {
  LayerCall mixer;  // length 1, without reset; x and y are those of the pair
  int64_t mlp_size;
  double mixer_epsilon, mlp_epsilon;
  const void *mixer_norm, *mlp_norm;        // (D,)
  const void *gate_and_input, *mlp_output;  // (2 mlp_size, D), the gates first; (D, mlp_size)
};

// y = weight (x norm / sqrt(mean(x^2) + epsilon)) for rows of x: the end of a model, from the last layer to its logits.
struct ReadoutCall {
  int64_t batch, width, count;
  int32_t storage, threads;  // kFloat or kDouble
  double epsilon;
  const void *x, *norm, *weight;  // (batch, width); (width,); (count, width)
  void* y;                        // (batch, count)
};

// One token through a whole model: rows of the embedding through residual pairs, each of which changes its state and the residual
// stream where they are, and then logits of the stream.
struct ModelCall {
  int64_t vocabulary, layers;
  const int64_t* tokens;  // (batch,)
  const void* embedding;  // (vocabulary, width)
  void* stream;           // (batch, width): x and y of every pair and x of the readout
  const PairCall* pairs;
  ReadoutCall readout;
};

// y = silu(gate) * inner for rows of x (2 size), the gates first; with grad_x its gradient instead. All contiguous.
struct GatedCall {
  int64_t rows, size;
  int32_t storage, threads;  // kFloat or kDouble
  const void *x, *grad_y;
  void *y, *grad_x;  // null: the one that is not wanted
};

// Whether objects of Python are as they were: a look at each. The functions that look are handed over by Python, so that the
// library links neither Python nor torch; who calls this holds Python's lock.
struct Place {  // of a tensor: DLTensor of DLPack 1
  void* data;
  int32_t device_type, device, ndim;
  uint8_t code, bits;  // of the dtype
  uint16_t lanes;
  int64_t *sizes, *strides;
  uint64_t offset;
};

using SizeOf = intptr_t(void* dictionary);                                     // PyDict_Size
using NextOf = int(void* dictionary, intptr_t* at, void** key, void** value);  // PyDict_Next
using ItemOf = void*(void* dictionary, void* key);                             // PyDict_GetItemWithError, which lends what it finds
using ClassOf = void*(void* object);                                           // PyObject_Type
using ResultOf = void*(void* function);                                        // PyObject_CallNoArgs
using AttributeOf = void*(void* object, void* name);                           // PyObject_GetAttr
using Release = void(void* object);                                            // Py_DecRef
using ForgetError = void();                                                    // PyErr_Clear
using PlaceOf = int(void* tensor, Place* place);                               // dltensor_from_py_object_no_sync of DLPack

enum Sight : int32_t { kSize = 0, kContents, kItem, kClass, kResult, kAttribute, kPlace };

struct Look {
  int64_t sight;
  void *object, *name;  // the name is of an item or attribute
  const void* wanted;   // kSize: a number; kContents: the values of a dictionary in its order, and null; kPlace: a Place
};

struct SnapshotCall {
  int64_t count;
  const Look* looks;
  SizeOf* size;
  NextOf* next;
  ItemOf* item;
  ClassOf* class_of;
  ResultOf* result;
  AttributeOf* attribute;
  Release* release;
  ForgetError* forget_error;
  PlaceOf* place;
};

// What a kernel throws where it finds no memory. It does so before its threads start: an exception that leaves one ends the
// process.
struct NoMemory {
  size_t bytes;  // that were wanted
};

struct Kernels {
  int vector_bytes;  // of a tile of blocks in the states and the raw gates that a layer keeps
  void (*scan_forward)(const ScanCall&);
  void (*scan_backward)(const ScanCall&);
  void (*layer_forward)(const LayerCall&);
  void (*layer_backward)(const LayerCall&);
  void (*layer_step)(const LayerCall&);  // length 1, without reset: y and final_state, nothing kept
  void (*pair_step)(const PairCall&);
  void (*model_step)(const ModelCall&);
  void (*gated)(const GatedCall&);
};

}  // namespace statemix
