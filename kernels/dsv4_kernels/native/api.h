// The C interface. Every function takes raw pointers to contiguous memory (float32 and int64 unless it says otherwise), never
// allocates what it returns, and cannot fail: shapes are checked in Python. Two calls at once are safe. After dsv4_begin they
// are queued (queue.h).
#pragma once

#define DSV4_API extern "C" __attribute__((visibility("default")))
