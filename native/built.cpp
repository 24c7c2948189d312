// Says that the kernels of an instruction set are in the library (kernels/native.py, available).
#include "vec.h"

EXPORT(built)() {}
