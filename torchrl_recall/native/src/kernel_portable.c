/* The walk in plain C, for any processor. */
#define RECALL_ISA 0
#define RECALL_BFLOAT16 0
#define NAME(x) x##_0
#include "walk.h"
#include "draws.h"
