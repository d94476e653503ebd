// Which ISA variants of the kernels this processor has, and which of them the operators use.
#pragma once

#include <c10/util/Exception.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <string>
#include <vector>

#include "isa.h"

struct Variant {
  const char* name;
  const Kernels* kernels;
};

#ifdef __aarch64__
inline std::vector<Variant> variants() {
#ifdef __APPLE__
  auto has = [](const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  const bool has_dots = has("hw.optional.arm.FEAT_DotProd"), has_bf16 = has("hw.optional.arm.FEAT_BF16");
#else
  const bool has_dots = getauxval(AT_HWCAP) & HWCAP_ASIMDDP, has_bf16 = getauxval(AT_HWCAP2) & HWCAP2_BF16;
#endif
  std::vector<Variant> supported;
  if (has_dots && has_bf16) supported.push_back({"neon_bf16", kernels_neon_bf16});
  if (has_dots) supported.push_back({"neon", kernels_neon});
  return supported;
}
#else
// Whether the processor has AMX with bfloat16 and Linux grants it to this process, which must request it.
inline bool amx_allowed() {
#ifdef __linux__
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // from asm/prctl.h and the processor's manual
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}

inline std::vector<Variant> variants() {
  std::vector<Variant> supported;
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_bf16 && amx_allowed()) supported.push_back({"amx", kernels_amx});
  if (has_bf16) supported.push_back({"avx512_bf16", kernels_avx512_bf16});
  if (has_avx512) supported.push_back({"avx512", kernels_avx512});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    supported.push_back({"avx2", kernels_avx2});
  return supported;
}
#endif

inline std::atomic<const Kernels*> chosen{nullptr};

// The kernels of the chosen ISA variant for a dtype. The best variant is used until `use_isa` chooses another.
inline const Kernels& kernels_for(bool float32) {
  const Kernels* now = chosen.load();
  if (now == nullptr) {
    const auto supported = variants();
    TORCH_CHECK(!supported.empty(), "this processor has neither AVX2 nor, on ARM, dot products of bytes");
    chosen.store(now = supported[0].kernels);
  }
  return now[float32 ? 0 : 1];
}

inline std::vector<std::string> isa_variants() {
  std::vector<std::string> names;
  for (const auto& each : variants()) names.emplace_back(each.name);
  return names;
}

inline void use_isa(std::string name) {
  for (const auto& each : variants())
    if (name == each.name) return chosen.store(each.kernels);
  TORCH_CHECK(false, "this processor has no ISA variant ", name);
}
