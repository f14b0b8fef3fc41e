// Copies into shared memory that run beside their thread, in the place of the toolkit's <cuda_pipeline.h>; runtime.cpp says when they are made.
#pragma once

#include <cstddef>

namespace cuda_on_host {

void copy_later(void* to, const void* from, size_t bytes);
void end_group();
void wait_for_groups(size_t all_but);

}  // namespace cuda_on_host

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) { cuda_on_host::copy_later(to, from, bytes); }
inline void __pipeline_commit() { cuda_on_host::end_group(); }
inline void __pipeline_wait_prior(size_t all_but) { cuda_on_host::wait_for_groups(all_but); }
