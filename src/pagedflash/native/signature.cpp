// What calls share: shapes, strides, dtypes and devices of their tensors, and their options, read in a quarter of the time that
// Python takes.
//
// One C function, called from ../signature.py with the GIL held. It needs no header of Python or torch: Python's functions are
// handed in once, and torch offers tensors as DLTensors (DLPackExchangeAPI of dlpack.h, since torch 2.10).
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define PAGEDFLASH_EXPORT extern "C" __declspec(dllexport)
#else
#define PAGEDFLASH_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

struct PyObject;

// Of Python's stable ABI, in the order of FUNCTIONS in ../signature.py.
struct Python {
  intptr_t (*tuple_size)(PyObject*);
  PyObject* (*tuple_item)(PyObject*, intptr_t);  // borrowed
  PyObject* (*type_of)(PyObject*);
  PyObject* (*attribute)(PyObject*, PyObject* name);
  PyObject* (*call_method)(PyObject*, PyObject* name, ...);
  long long (*int_value)(PyObject*);
  double (*float_value)(PyObject*);
  PyObject* (*bytes)(const char*, intptr_t size);
  void (*release)(PyObject*);
  PyObject* (*error)();  // borrowed
  void (*clear_error)();
};

// In the order of OBJECTS there. They live as long as the process.
struct Objects {
  PyObject *none, *yes, *no;
  PyObject *int_type, *float_type, *tuple_type, *tensor, *parameter;
  PyObject *is_neg, *requires_grad;  // names
};

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void *previous, *allocate, *managed_from_tensor, *managed_to_tensor;
  int (*view)(void* tensor, DLTensor*);  // keeps nothing alive
  void* current_stream;
};

Python python;
Objects objects;
const DLPackExchangeAPI* exchange;

constexpr intptr_t MAX_WORDS = 512;

// What has been written of a signature. `known` turns false for good where there is no telling, or no room.
struct Words {
  int64_t values[MAX_WORDS];
  intptr_t size = 0;
  bool known = true;

  void add(int64_t word) {
    known = known && size < MAX_WORDS;
    if (known) values[size++] = word;
  }
};

PyObject* type_of(PyObject* object) {
  PyObject* type = python.type_of(object);
  python.release(type);  // the object keeps it
  return type;
}

bool is_true(PyObject* answer) {
  if (answer) python.release(answer);
  return answer == objects.yes;
}

// | kind | value |, or | kind |; a tuple has its length for a value, and then its items. A kind is never taken for another.
void add_option(Words& words, PyObject* option) {
  enum { NONE, YES, NO, INT, FLOAT, TUPLE };
  PyObject* type = type_of(option);
  if (option == objects.none || option == objects.yes || option == objects.no) {
    words.add(option == objects.none ? NONE : option == objects.yes ? YES : NO);
  } else if (type == objects.int_type) {
    const int64_t value = python.int_value(option);
    words.add(INT);
    words.add(value);
    if (value == -1 && python.error()) words.known = false;  // too large
  } else if (type == objects.float_type) {
    const double value = python.float_value(option);
    int64_t bits;
    memcpy(&bits, &value, sizeof(bits));
    words.add(FLOAT);
    words.add(bits);
  } else if (type == objects.tuple_type) {
    const intptr_t count = python.tuple_size(option);
    words.add(TUPLE);
    words.add(count);
    for (intptr_t i = 0; words.known && i < count; ++i) add_option(words, python.tuple_item(option, i));
  } else {
    words.known = false;  // its value may change
  }
}

// | ndim, device type | device id, dtype | flags | shape and stride of each axis |, or | -1 | for None. Returns the address.
int64_t add_tensor(Words& words, PyObject* object, bool tracks_grad) {
  if (object == objects.none) return words.add(-1), 0;
  PyObject* type = type_of(object);
  DLTensor tensor;
  // A subclass may be anything.
  if ((type != objects.tensor && type != objects.parameter) || exchange->view(object, &tensor) != 0) {
    words.known = false;
    return 0;
  }
  int64_t flags = is_true(python.call_method(object, objects.is_neg, nullptr));
  if (tracks_grad) flags |= is_true(python.attribute(object, objects.requires_grad)) << 1;
  words.add(static_cast<int64_t>(tensor.ndim) << 32 | static_cast<uint32_t>(tensor.device_type));
  words.add(static_cast<int64_t>(tensor.device_id) << 32 | tensor.dtype.code << 24 | tensor.dtype.bits << 16 | tensor.dtype.lanes);
  words.add(flags);
  for (int axis = 0; axis < tensor.ndim; ++axis) {
    words.add(tensor.shape[axis]);
    words.add(tensor.strides[axis]);
  }
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset);
}

}  // namespace

PAGEDFLASH_EXPORT void pagedflash_use_python(const void* functions, const void* python_objects, const void* dlpack) {
  memcpy(&python, functions, sizeof(python));
  memcpy(&objects, python_objects, sizeof(objects));
  exchange = static_cast<const DLPackExchangeAPI*>(dlpack);
}

// bytes of a tuple of tensors or None, and of a tuple of options: the address of each tensor (0 for None), then the signature.
// Empty where there is no telling.
PAGEDFLASH_EXPORT PyObject* pagedflash_signature(PyObject* tensors, PyObject* options, int64_t tracks_grad) {
  Words words;
  const intptr_t count = python.tuple_size(tensors);
  for (intptr_t i = 0; i < count; ++i) words.add(0);
  words.add(count << 1 | tracks_grad);
  for (intptr_t i = 0; words.known && i < count; ++i) {
    words.values[i] = add_tensor(words, python.tuple_item(tensors, i), tracks_grad);
  }
  if (words.known) add_option(words, options);
  if (!words.known) python.clear_error();
  return python.bytes(reinterpret_cast<const char*>(words.values), words.known ? words.size * sizeof(int64_t) : 0);
}
