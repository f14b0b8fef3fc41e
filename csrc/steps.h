// The steps of RawBoost's algorithms 1 to 8, as STEPS in gradalign/reference.py.
#pragma once

#include "common.h"

namespace gradalign {

struct Steps {
  bool lnl, isd, ssi;
  // 8 adds LnL's and ISD's results.
  bool parallel;
};

inline Steps steps_of(int64_t algo) {
  STD_TORCH_CHECK(algo >= 1 && algo <= 8, "`algo` must be one of 1..8; found ", algo);
  return {algo == 1 || (algo >= 4 && algo != 7), algo == 2 || algo == 4 || algo == 5 || algo >= 7, algo == 3 || algo == 4 || algo == 6 || algo == 7,
          algo == 8};
}

}  // namespace gradalign
