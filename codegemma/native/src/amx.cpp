// Whether this process can use AMX: the CPU must have it, the system must save its registers, and Linux wants to be asked
// before the first use. The permission is the process's, and threads that start later have it too.
#include "program.h"

#if defined(CG_AMX)
#include <cerrno>
#include <cpuid.h>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cg {
namespace {

#if defined(CG_AMX)
std::string ask() {
  constexpr int TILE_DATA = 18, REQUEST_PERMISSION = 0x1023;  // the state's number in XCR0; ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 22 & 1);
  if (!tiles || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return "this CPU has no AMX";
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return "the system does not save AMX's registers (no XSAVE)";
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return "the system does not save AMX's registers (XCR0)";
  if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA))
    return std::string("the kernel refuses it: arch_prctl: ") + strerror(errno);
  return "";
}
#elif defined(__x86_64__) && defined(__linux__)
std::string ask() { return "this build lacks it, as its compiler did not know the instructions"; }
#else
std::string ask() { return "only Linux on x86-64 has this level"; }
#endif

}  // namespace

const std::string& why_no_amx() {
  static const std::string reason = ask();
  return reason;
}

}  // namespace cg
