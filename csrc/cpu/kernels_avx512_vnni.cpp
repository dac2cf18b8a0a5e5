#define RF_ISA avx512_vnni
#define RF_VECTOR_BYTES 64
#define RF_ROWS_AT_ONCE 12
#define RF_PAIRS RF_INT16
#include "kernels.inc"
