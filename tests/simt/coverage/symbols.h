// Names of the running program's functions, also of those that no other file can name.
#pragma once

#include <map>
#include <set>
#include <string>

namespace attamba::simt {

/// The mangled name of each of these functions of the program's file, or "?" where its symbol table has none.
std::map<const void*, std::string> symbol_names(const std::set<const void*>& functions);

}  // namespace attamba::simt
