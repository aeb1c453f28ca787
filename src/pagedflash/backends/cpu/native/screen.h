// The cheap check of lengths and table entries, before anything is written.
#pragma once

#include "abi.h"

namespace pagedflash {

// False if check_values (or check_write_values) of pagedflash/call.py would raise: the caller asks those for the message.
bool values_are_good(const AttentionCall& call);
bool values_are_good(const CacheWrite& write);

}  // namespace pagedflash
