// Everything a translated kernel sees.
#pragma once
#include "kernel.h"
