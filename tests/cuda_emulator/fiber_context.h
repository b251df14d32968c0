// Switching between stacks: a dozen instructions on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__x86_64__) && !defined(CUDA_EMULATOR_UCONTEXT)
#define CUDA_EMULATOR_OWN_SWITCH
#else
#include <ucontext.h>
#endif

namespace cuda_emulator {

#if defined(CUDA_EMULATOR_OWN_SWITCH)
using Context = void*;
__attribute__((naked, noinline, noipa)) inline void switch_context(Context* /*save*/, Context* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void make_context(Context* context, void* stack, std::size_t bytes, void (*entry)()) {
  auto top = (reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~std::uintptr_t(15);
  auto* slots = reinterpret_cast<void**>(top) - 2;  // the return address sits so that rsp = 8 (mod 16) at entry
  slots[0] = reinterpret_cast<void*>(entry);
  slots[1] = nullptr;
  for (int i = 1; i <= 6; ++i) slots[-i] = nullptr;
  *context = slots - 6;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* save, Context* load) { swapcontext(save, load); }
inline void make_context(Context* context, void* stack, std::size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

}  // namespace cuda_emulator
