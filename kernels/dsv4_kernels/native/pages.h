// Weights that do not all fit into memory: who is about to multiply asks the system for their bytes first.
#pragma once

#include "weight.h"

namespace dsv4 {

// Whether asking is worth its time: for weights that lie in memory it is not.
bool asks_ahead();

// Has the system begin to read a matrix from its file; returns before it has. Does nothing for memory that is no file's.
void ask_for(const Weight& weight);

}  // namespace dsv4
