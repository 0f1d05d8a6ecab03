// Texts between ranks: what rare decisions, such as which checkpoint to load, are told with.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace attamba {

/// Every rank's text, by rank, on every rank.
std::vector<std::string> gather_text(const std::string& text, Communicator& communicator);
/// Rank 0's text on every rank.
std::string broadcast_text(std::string text, Communicator& communicator);
/// Runs `body` on rank 0 and returns its text on every rank; when it throws there, every rank throws an Error with its message.
std::string on_rank_0(const std::function<std::string()>& body, Communicator& communicator);

}  // namespace attamba
