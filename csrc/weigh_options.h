// The arguments of `weigh` and `align_` as csrc/weigh.h takes them; host only.
#pragma once

#include <algorithm>
#include <iterator>
#include <string>

#include "common.h"
#include "weigh.h"

namespace gradalign {

inline WeighOptions weigh_options(const std::string& method, int64_t num_paths, double beta, bool always, double c) {
  static constexpr const char* kNames[] = {"mean", "pcgrad", "gradvac", "cagrad", "mgda", "dualproj", "upgrad", "imtlg", "alignedmtl", "nashmtl"};
  static_assert(std::size(kNames) == size_t(Weighing::kCount));
  const auto name = std::find(std::begin(kNames), std::end(kNames), method);
  STD_TORCH_CHECK(name != std::end(kNames), "an unknown method; found ", method);
  STD_TORCH_CHECK(num_paths >= 1 && num_paths <= kMaxPaths, "the number of paths must be 1 to ", kMaxPaths, "; found ", num_paths);
  return {Weighing(name - kNames), always, beta, c};
}

}  // namespace gradalign
