// The runtime as one translation unit.
#include "scheduler.cpp"
#include "watch.cpp"
#include "arithmetic.cpp"
