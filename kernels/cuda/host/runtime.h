// What kernels that run on the host share with what runs them (driver.cpp): the lanes of one block.
#pragma once

struct Dim { unsigned x, y, z; };

enum Wait { READY, AT_WARP, AT_BLOCK, AT_COPIES };

// A thread of the block: a stack of its own, and what it waits for.
struct Lane {
  void* stack_pointer;
  unsigned index;
  Wait wait;
  unsigned seen;                     // generation of what it waits for
  const unsigned long long* barrier; // of bulk copies, and the parity that is waited for
  unsigned parity;
  bool done;
};

struct Warp {
  unsigned arrived, generation, alive;
  unsigned turn;                      // of the two buffers
  unsigned words[2][32][8];           // what lanes hand each other
  unsigned lane_turn[32];
};

struct Runtime {
  Lane* lane;      // that runs
  Warp* warp;
  Dim block, grid_dim, block_dim;
  char* shared;    // below 4 GiB, so that an address is a word
  void (*warp_barrier)();
  void (*block_barrier)();
  void (*wait_copies)(const unsigned long long* barrier, unsigned parity);
  void (*copy)(unsigned to, const void* from, unsigned bytes);
  void (*copies_end)();
  void (*copies_wait)(int left);
  void (*trap)();  // what __trap does: from now on the device gives nothing but errors
};
