// bugs ORDER NAME [fixed]: runs one kernel of bugs.cu.
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "bugs.h"
#include "control.h"

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  emulator_set_order(atoi(argv[1]));
  try {
    return launch_bug(argv[2], argc > 3) ? 0 : 2;
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
