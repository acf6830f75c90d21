// Reads of mapped files that survive their end. Where a page of a mapping is gone, because the file
// was cut or its disk failed, the kernel sends SIGBUS, which would end the process.
#pragma once

#include <cstdint>

namespace megaswitch {

// Copies `bytes` from a mapped file. False, with part of `to` written, where a page is gone.
// A signal handler must be in place: see claim_bus_errors().
bool copy_mapped(void* to, const void* from, uint64_t bytes);

// Puts our handler of SIGBUS before the one that is there, if ours is not first already. It acts on
// faults of copy_mapped() in the faulting thread alone and leaves all others to the handler before.
// Called again from time to time, as whoever sets a handler later replaces ours.
void claim_bus_errors();

}  // namespace megaswitch
