// Quantizing, compiled once per instruction set without contracted multiply-adds: the same bytes
// must come out everywhere, and out of mnemon.formats in torch.
#include "pack.h"
