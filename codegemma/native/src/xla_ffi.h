// The part of XLA's foreign function interface that a CPU handler needs. It is a stable C ABI: version 0.3 of
// xla/ffi/api/c_api.h, which jaxlib ships. When a handler is registered, XLA asks it for its version and refuses one that it
// does not support. Every struct begins with its size; newer versions may have more fields at the end.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cg::xla {

enum Dtype : int { S32 = 4, U8 = 6, F32 = 11 };
enum { INVALID_ARGUMENT = 3, INTERNAL = 13 };

struct Extension { size_t size; int type; Extension* next; };
struct Struct { size_t size; Extension* extension; };
struct Version : Struct { int major, minor; };
struct Metadata { size_t size; Version version; uint32_t traits; };
struct MetadataExtension { Extension base; Metadata* metadata; };  // type 1
struct Error;
struct ErrorText : Struct { const char* message; int code; };
struct Api : Struct { Version version; const void* internal; Error* (*create_error)(ErrorText*); };
struct Buffer : Struct { int dtype; void* data; int64_t rank; const int64_t* dims; };
struct Buffers : Struct { int64_t count; int* types; Buffer** values; };
struct Name { const char* text; size_t length; };
struct Scalar { int dtype; void* value; };
struct Attributes : Struct { int64_t count; int* types; Name** names; Scalar** values; };  // sorted by name
struct Call : Struct {
  const Api* api;
  void* context;
  int stage;
  Buffers arguments, results;
  Attributes attributes;
};

}  // namespace cg::xla
