"""What kernels are written with: compilation with a disk cache, and LLVM vectors."""
