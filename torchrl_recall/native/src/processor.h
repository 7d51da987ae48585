/* Which kernels can be compiled here. */
#ifndef RECALL_PROCESSOR_H
#define RECALL_PROCESSOR_H

/* GCC for Windows does not align the vectors that it puts on the stack. */
#if defined(__MINGW32__) && !defined(__clang__)
#define RECALL_X86 0
#elif (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define RECALL_X86 1
#else
#define RECALL_X86 0
#endif

/* GCC knows bfloat16 from version 10 on. */
#if RECALL_X86 && (defined(__clang__) || __GNUC__ >= 10)
#define RECALL_X86_BFLOAT16 1
#else
#define RECALL_X86_BFLOAT16 0
#endif

#endif
