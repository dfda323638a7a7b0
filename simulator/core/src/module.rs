//! Modules, libraries and the functions in them.
//!
//! A module takes memory when its code is first needed (lazy loading, the default since CUDA 12)
//! or when it is loaded (`CUDA_MODULE_LOADING=EAGER`).

use crate::code::{R, SHARED_OBJECT_INIT_FAILED};
use crate::config::FRAME;
use crate::context::Context;
use crate::driver::Driver;
use crate::kernels::Builtin;
use crate::ptx::{self, Entry};
use crate::space::{Physical, fresh_id};
use crate::sync::lock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex};

/// A module loaded in a context.
pub struct Module {
    pub id: u64,
    pub context: u64,
    gpu: u32,
    pub entries: Arc<Vec<Entry>>,
    functions: Mutex<Vec<u64>>,
    loaded: AtomicBool,
    charge: Mutex<Option<Arc<Physical>>>,
}

/// A function of a module.
pub struct Function {
    pub id: u64,
    pub module: Arc<Module>,
    pub index: usize,
    pub builtin: Option<Builtin>,
    pub dynamic_shared_max: AtomicI32,
}

impl Function {
    #[must_use]
    pub fn entry(&self) -> &Entry {
        &self.module.entries[self.index]
    }
}

/// Whether code is loaded when first used.
#[must_use]
pub fn lazy() -> bool {
    std::env::var_os("CUDA_MODULE_LOADING").is_none_or(|mode| mode != "EAGER")
}

fn newest_ptx(driver: &Driver) -> (u32, u32) {
    driver.shared.config().release().ptx
}

impl Module {
    /// Loads PTX into a context.
    ///
    /// # Errors
    /// Those of the PTX reader; `OUT_OF_MEMORY` if loading is eager.
    pub fn load(driver: &'static Driver, context: &Context, text: &str) -> R<Arc<Self>> {
        Self::of_entries(
            driver,
            context,
            Arc::new(ptx::parse(text, newest_ptx(driver))?),
        )
    }

    /// Loads what was parsed before.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if loading is eager.
    pub fn of_entries(
        driver: &'static Driver,
        context: &Context,
        entries: Arc<Vec<Entry>>,
    ) -> R<Arc<Self>> {
        let module = Arc::new(Self {
            id: fresh_id(),
            context: context.id,
            gpu: context.gpu,
            entries,
            functions: Mutex::default(),
            loaded: AtomicBool::new(false),
            charge: Mutex::new(None),
        });
        if !lazy() {
            module.need(driver)?;
        }
        let mut functions = lock(&module.functions);
        for (index, entry) in module.entries.iter().enumerate() {
            let function = Arc::new(Function {
                id: fresh_id(),
                module: Arc::clone(&module),
                index,
                builtin: Builtin::find(&entry.name, entry.params_bytes())
                    .or(entry.idle.then_some(Builtin::Nothing)),
                dynamic_shared_max: AtomicI32::new(48 << 10),
            });
            functions.push(function.id);
            driver.functions.insert(function.id, function);
        }
        drop(functions);
        driver.modules.insert(module.id, Arc::clone(&module));
        Ok(module)
    }

    /// Makes sure that the code is on the device.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`; `SHARED_OBJECT_INIT_FAILED` without memory for the heap that its code uses.
    pub fn need(&self, driver: &'static Driver) -> R {
        if self.loaded.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut charge = lock(&self.charge);
        let bytes = driver.shared.config().module.next_multiple_of(FRAME);
        if charge.is_none() && bytes > 0 {
            *charge = Some(Physical::charge(driver.shared, self.gpu, bytes)?);
        }
        if self.entries.iter().any(|entry| entry.heap)
            && let Some(context) = driver.contexts.get(self.context)
        {
            let heap = context.limits.need_heap();
            heap.map_err(|_| SHARED_OBJECT_INIT_FAILED)?;
        }
        self.loaded.store(true, Ordering::Release);
        Ok(())
    }

    #[must_use]
    pub fn loaded(&self) -> bool {
        self.loaded.load(Ordering::Acquire)
    }

    /// The handles of its functions, in the order of the text.
    #[must_use]
    pub fn functions(&self) -> Vec<u64> {
        lock(&self.functions).clone()
    }

    /// The handle of the function of that name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<u64> {
        let index = self.entries.iter().position(|e| e.name == name)?;
        lock(&self.functions).get(index).copied()
    }

    /// Takes the module away.
    pub fn unload(&self, driver: &Driver) {
        for function in self.functions() {
            driver.functions.remove(function);
        }
        driver.modules.remove(self.id);
        *lock(&self.charge) = None;
    }
}

/// A library: loaded once, with a module in each context that uses it.
pub struct Library {
    pub id: u64,
    pub entries: Arc<Vec<Entry>>,
    pub kernels: Vec<u64>,
    modules: Mutex<Vec<(u64, u64)>>,
}

/// A kernel of a library.
pub struct Kernel {
    pub id: u64,
    pub library: u64,
    pub index: usize,
}

impl Library {
    /// Reads PTX.
    ///
    /// # Errors
    /// Those of the PTX reader.
    pub fn load(driver: &Driver, text: &str) -> R<Arc<Self>> {
        let entries = Arc::new(ptx::parse(text, newest_ptx(driver))?);
        let id = fresh_id();
        let kernels = (0..entries.len())
            .map(|index| {
                let kernel = Kernel {
                    id: fresh_id(),
                    library: id,
                    index,
                };
                let handle = kernel.id;
                driver.kernels.insert(handle, Arc::new(kernel));
                handle
            })
            .collect();
        let library = Arc::new(Self {
            id,
            entries,
            kernels,
            modules: Mutex::default(),
        });
        driver.libraries.insert(id, Arc::clone(&library));
        Ok(library)
    }

    /// The library's module in `context`.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if loading is eager.
    pub fn module(&self, driver: &'static Driver, context: &Context) -> R<Arc<Module>> {
        let mut modules = lock(&self.modules);
        modules.retain(|(_, module)| driver.modules.get(*module).is_some());
        let known = modules
            .iter()
            .find(|m| m.0 == context.id)
            .and_then(|m| driver.modules.get(m.1));
        if let Some(module) = known {
            return Ok(module);
        }
        let module = Module::of_entries(driver, context, Arc::clone(&self.entries))?;
        modules.push((context.id, module.id));
        Ok(module)
    }

    pub fn unload(&self, driver: &Driver) {
        for (_, module) in lock(&self.modules).drain(..) {
            if let Some(module) = driver.modules.get(module) {
                module.unload(driver);
            }
        }
        for kernel in &self.kernels {
            driver.kernels.remove(*kernel);
        }
        driver.libraries.remove(self.id);
    }
}
