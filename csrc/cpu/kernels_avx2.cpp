#define RF_ISA avx2
#define RF_VECTOR_BYTES 32
#define RF_ROWS_AT_ONCE 6
#define RF_PAIRS RF_INT16
#include "kernels.inc"
