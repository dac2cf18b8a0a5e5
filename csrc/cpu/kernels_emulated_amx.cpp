#define RF_ISA emulated_amx
#define RF_VECTOR_BYTES 64
#define RF_ROWS_AT_ONCE 12
#define RF_PAIRS RF_BF16
#define RF_AMX 1
#include "kernels.inc"
