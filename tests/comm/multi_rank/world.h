// For tests that run under mpirun: one communicator for the whole program, made by the main() in main.cpp.
#pragma once

#include "comm/communicator.h"

namespace attamba {

Communicator& world();

}  // namespace attamba
