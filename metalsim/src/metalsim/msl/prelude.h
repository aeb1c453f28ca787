// Everything a translated kernel sees.
#pragma once
#include "atomic.h"
#include "kernel.h"
#include "matrix.h"
#ifdef METALSIM_SPACES
#include "spaces.h"
#endif
