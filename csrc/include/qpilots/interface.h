// The lists of types.h as text, one line each; host only. Python makes the same text of its own lists: what was
// compiled from others does not load.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "qpilots/types.h"

namespace qpilots {

// The enumerators' names in Python, in order.
template <class Enum>
std::vector<std::string> names_of();

#define QPILOTS_NAME(enumerator, name) name,
#define QPILOTS_NAMES_OF(Enum, LIST)                 \
  template <>                                        \
  inline std::vector<std::string> names_of<Enum>() { \
    return {LIST(QPILOTS_NAME)};                     \
  }
QPILOTS_ENUMS(QPILOTS_NAMES_OF)

// "<name> <value> <value> ..", a line.
inline std::string interface_line(const std::string& name, const std::vector<std::string>& values) {
  std::string line = name;
  for (const std::string& value : values) line += " " + value;
  return line + "\n";
}

inline std::vector<std::string> steering_layout() {  // field:type@offset, then the size
  const auto field = [](const char* name, bool is_float, std::size_t offset) {
    return std::string(name) + (is_float ? ":float32@" : ":int32@") + std::to_string(offset);
  };
#define QPILOTS_LAYOUT(type, name) field(#name, std::is_same<type, float>::value, offsetof(SteeringParams, name)),
#define QPILOTS_FOUR_BYTES(type, name) static_assert(sizeof(type) == 4, #name);
  QPILOTS_STEERING_FIELDS(QPILOTS_FOUR_BYTES)
  return {QPILOTS_STEERING_FIELDS(QPILOTS_LAYOUT) std::to_string(sizeof(SteeringParams))};
}

inline std::string interface_text() {
  std::string text;
#define QPILOTS_LINE(Enum, LIST) text += interface_line(#Enum, names_of<Enum>());
  QPILOTS_ENUMS(QPILOTS_LINE)
  return text + interface_line("SteeringParams", steering_layout());
}

}  // namespace qpilots
