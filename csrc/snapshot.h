// Whether objects of Python are as they were, in a few nanoseconds each: `SnapshotCall` of interface.h.
#pragma once
#include <cstring>

#include "interface.h"

namespace statemix {

// Objects that are asked of memory before they are looked at: the weights of a step push them out of the cache.
constexpr int64_t kAhead = 12;

inline bool same_place(const Place& now, const Place& then) {
  const size_t bytes = size_t(now.ndim) * sizeof *now.sizes;
  return !std::memcmp(&now, &then, offsetof(Place, sizes)) && !std::memcmp(now.sizes, then.sizes, bytes) &&
         !std::memcmp(now.strides, then.strides, bytes);
}

// Takes a reference, and gives it back: only the address counts.
inline bool same(const SnapshotCall& call, void* found, const Look& look) {
  if (!found) return false;
  call.release(found);
  return found == look.wanted;
}

inline bool as_it_was(const SnapshotCall& call, const Look& look) {
  switch (look.sight) {
    case kSize: return call.size(look.object) == reinterpret_cast<intptr_t>(look.wanted);
    case kContents: {
      auto wanted = static_cast<void* const*>(look.wanted);
      void* value;
      for (intptr_t at = 0; call.next(look.object, &at, nullptr, &value); ++wanted)
        if (value != *wanted) return false;
      return !*wanted;
    }
    case kItem: return call.item(look.object, look.name) == look.wanted;
    case kClass: return same(call, call.class_of(look.object), look);
    case kResult: return same(call, call.result(look.object), look);
    case kAttribute: return same(call, call.attribute(look.object, look.name), look);
    default: {
      Place place;
      return !call.place(look.object, &place) && same_place(place, *static_cast<const Place*>(look.wanted));
    }
  }
}

inline bool all_as_they_were(const SnapshotCall& call) {
  for (int64_t i = 0; i < call.count; ++i) {
    if (i + kAhead < call.count) __builtin_prefetch(call.looks[i + kAhead].object);
    if (!as_it_was(call, call.looks[i])) {
      call.forget_error();  // an attribute that is gone is a change and no error
      return false;
    }
  }
  return true;
}

}  // namespace statemix
