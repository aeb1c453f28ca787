// The runtime as one translation unit.
#include "scheduler.cpp"
#include "observe.cpp"
#include "arithmetic.cpp"
