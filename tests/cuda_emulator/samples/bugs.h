#pragma once

// False where there is no such kernel or it was not launched.
bool launch_bug(const char* name, bool fixed);
