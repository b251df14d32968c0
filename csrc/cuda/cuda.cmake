#The CUDA kernels as a shared library of their own, with a C ABI that qpilots_fast / backends / cuda loads.
#- DQPILOTS_CUDA_ARCHITECTURES = 90 shortens the build; without it : the GPU of this machine, or every supported one.
find_program(QPILOTS_NVIDIA_SMI nvidia - smi) if (QPILOTS_NVIDIA_SMI)
    set(QPILOTS_CUDA_ARCHITECTURES native CACHE STRING "GPUs to compile for") else()
        set(QPILOTS_CUDA_ARCHITECTURES 80 86 - real 89 - real 90 - real 100 - real 120 -
            real CACHE STRING "GPUs to compile for") endif() set(CMAKE_CUDA_ARCHITECTURES ${QPILOTS_CUDA_ARCHITECTURES})
            enable_language(CUDA) add_library(qpilots_cuda SHARED ${CMAKE_CURRENT_LIST_DIR} /
                                              device.cu ${CMAKE_CURRENT_LIST_DIR} / pack.cu ${CMAKE_CURRENT_LIST_DIR} /
                                              sample.cu ${CMAKE_CURRENT_LIST_DIR} / steer_step.cu)
                target_include_directories(qpilots_cuda PRIVATE ${CMAKE_CURRENT_LIST_DIR} ${CMAKE_CURRENT_LIST_DIR} /../
                                           include)
#- fmad = false : the maths says where it fuses, so that a row has the same bits in every variant of a kernel
                    target_compile_options(qpilots_cuda PRIVATE - fmad = false)
                        set_target_properties(qpilots_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                                                  CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
                            install(TARGETS qpilots_cuda LIBRARY DESTINATION.)
