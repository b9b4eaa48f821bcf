# An application on ActiveRecord that knows nothing but DATABASE_URL: a migration under its lock, threads with transactions.
require 'active_record'

ActiveRecord::Base.establish_connection(ENV.fetch('DATABASE_URL'))
ActiveRecord::Migration.verbose = false

class CreateItems < ActiveRecord::Migration[6.1]
  def change
    create_table(:exec_items) do |t|
      t.string :name
      t.integer :number
    end
  end
end

ActiveRecord::Migrator.new(:up, [CreateItems.new('CreateItems', 1)], ActiveRecord::SchemaMigration).migrate

class Item < ActiveRecord::Base
  self.table_name = 'exec_items'
end

threads = 4.times.map do |me|
  Thread.new do
    ActiveRecord::Base.connection_pool.with_connection do
      20.times do |number|
        item = Item.create!(name: "worker #{me}", number: number)
        raise 'lost' unless Item.find(item.id).name == "worker #{me}"
        Item.transaction { item.update!(number: number + 100) }
      end
    end
  end
end
threads.each(&:join)
raise 'count' unless Item.where('number >= 100').count == 80
puts 'ok'
