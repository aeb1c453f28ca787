// Everything a translated kernel sees.
#pragma once
#include "atomic.h"
#include "kernel.h"
#include "matrix.h"
