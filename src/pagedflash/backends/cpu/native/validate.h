// Cheap validation of lengths and table entries, before anything is written.
#pragma once

#include "abi.h"

namespace pagedflash {

// INVALID_VALUES where check_values (or check_write_values) of pagedflash/validate_values.py raises: those say what is wrong.
// Only entries of the block table that the problem reads or writes are looked at.
Status validate(const AttentionProblem& problem);
Status validate(const CacheWrite& write);

}  // namespace pagedflash
