#include "src/core/names.h"

#include <algorithm>

namespace attamba {

std::size_t edit_distance(std::string_view a, std::string_view b) {
  // Rows of the Damerau-Levenshtein table (neighbours swapped at most once): before the previous, previous, current.
  std::vector<std::size_t> before(b.size() + 1), previous(b.size() + 1), current(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) {
    previous[j] = j;
  }
  for (std::size_t i = 1; i <= a.size(); ++i) {
    current[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      current[j] = std::min({previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        current[j] = std::min(current[j], before[j - 2] + 1);
      }
    }
    std::swap(before, previous);
    std::swap(previous, current);
  }
  return previous[b.size()];
}

std::string_view nearest_name(std::string_view name, const std::vector<std::string_view>& known) {
  std::string_view nearest;
  std::size_t least = std::max<std::size_t>(2, name.size() / 3) + 1;
  for (const std::string_view candidate : known) {
    // A name typed in part ("micro" for "micro_batch", "lr" for "optim.lr") is nearer than its missing letters say.
    const bool last =
        candidate.ends_with(name) && candidate.size() > name.size() && candidate[candidate.size() - name.size() - 1] == '.';
    const bool part = last || (name.size() >= 3 && (candidate.starts_with(name) || candidate.ends_with(name)));
    const std::size_t distance = part ? 1 : edit_distance(name, candidate);
    if (distance < least && distance < std::max(name.size(), candidate.size())) {
      least = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

std::string advice_on_names(std::string_view name, const std::vector<std::string_view>& known) {
  const std::string_view nearest = nearest_name(name, known);
  std::string text = nearest.empty() ? std::string() : concat("did you mean \"", nearest, "\"? ");
  text += "Known: ";
  for (std::size_t i = 0; i < known.size(); ++i) {
    text += concat(i == 0 ? "" : ", ", known[i]);
  }
  return text;
}

void require_known(std::string_view key, std::string_view name, const std::vector<std::string_view>& known) {
  require<UsageError>(std::find(known.begin(), known.end(), name) != known.end(), key, " = \"", name, "\": no such name; ",
                      advice_on_names(name, known));
}

}  // namespace attamba
