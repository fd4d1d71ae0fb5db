// Products with IQ2_XXS where the processor looks 64 bytes up at once (see planes.cpp).
#pragma once

#include "grids.h"
#include "weight.h"

#if DSV4_LOOKS_UP_MANY

namespace dsv4 {

// To be called when the grid has been set.
void set_planes();

// As `multiply`, of a matrix in IQ2_XXS.
void multiply_planes(const Weight& weight, int64_t begin, int64_t end, const Activations& x, const Picked& picked, float* y,
                     int64_t y_stride);

}  // namespace dsv4

#endif
