#define RF_ISA baseline
#define RF_VECTOR_BYTES 16
#define RF_ROWS_AT_ONCE 6
#include "kernels.inc"
