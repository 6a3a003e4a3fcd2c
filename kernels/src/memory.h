// Memory of one thread that grows to what was needed most and is kept: calls in a row allocate nothing.
#pragma once
#include <cstddef>
#include <cstdlib>

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(bytes_); }

  // At least `bytes`, aligned to 64; what was there is lost. Null if there is none.
  void* take(size_t bytes) {
    if (bytes > size_) {
      std::free(bytes_);
      size_ = (bytes + 4095) / 4096 * 4096;
      bytes_ = std::aligned_alloc(64, size_);
      if (!bytes_) size_ = 0;
    }
    return bytes_;
  }

 private:
  void* bytes_ = nullptr;
  size_t size_ = 0;
};

// Hands out parts of one block; with a null base it only counts.
class Parts {
 public:
  explicit Parts(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class T>
  T* next(size_t count) {
    unsigned char* at = base_ ? base_ + used_ : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};
