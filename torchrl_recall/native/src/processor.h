/* Which kernels can be compiled here. */
#ifndef RECALL_PROCESSOR_H
#define RECALL_PROCESSOR_H

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define RECALL_X86 1
#else
#define RECALL_X86 0
#endif

#endif
